"""Counters and histograms in vLLM's own ``/metrics``, and a line in its periodic log."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cacheblend_rag.metric_figures import DEVIATIONS, SECONDS, SOURCES, SQUARED_DISTANCES
from cacheblend_rag.stats import BlendStats

_PARTS = ("load", "select", "recompute")
_READ = {"bytes": "Bytes of chunk KV that prompts read", "seconds": "Seconds that prompts' chunks took to be read"}
_EVENTS = {
    "chunk_faults": "Matched chunks that could not be read",
    "blend_faults": "Blends that failed and were prefilled plainly",
    "errors": "Requests with settings that could not be understood, and chunks that could not be stored",
    "warmed_chunks": "Chunks prefilled and stored",
    "slow_chunks": "Matched chunks on disk that were prefilled, since reading them would have taken longer",
}


class BlendMetrics(KVConnectorStats):
    """What happened since the last report: plain numbers and lists in ``data``, since it crosses processes."""

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def count(self, event: str, times: float = 1) -> None:
        """Count one of the events."""
        if times:
            self.data[event] = self.data.get(event, 0) + times

    def observe(self, stats: BlendStats) -> None:
        """Count a request that was answered."""
        self.count(f"requests_{stats.decision}")
        for kind in SOURCES:
            self.count(f"tokens_{kind}", getattr(stats, f"{kind}_tokens"))
        self.data.setdefault(f"ttft_{stats.decision}", []).append(stats.ttft)
        if stats.decision == "blend":
            for part in _PARTS:
                self.data.setdefault(f"seconds_{part}", []).append(getattr(stats, part))
        for tier, nbytes in stats.read_bytes.items():
            self.count(f"read-bytes_{tier}", nbytes)
            self.count(f"read-seconds_{tier}", stats.read_seconds[tier])
        for name, value in stats.deviation.items():
            self.data.setdefault(f"deviation_{name}", []).append(value)

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another report to this one."""
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value if name in self.data else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        return {name: value for name, value in self.data.items() if not isinstance(value, list)}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data


class BlendPromMetrics(KVConnectorPromMetrics):
    """The same in Prometheus: ``vllm:cacheblend_*``, with vLLM's labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, histogram = metric_types[Counter], metric_types[Histogram]
        self._requests = counter(
            name="vllm:cacheblend_requests",
            documentation="Requests by how their prompts were read",
            labelnames=[*labelnames, "decision"],
        )
        self._tokens = counter(
            name="vllm:cacheblend_prompt_tokens",
            documentation="Prompt tokens by where their KV came from",
            labelnames=[*labelnames, "source"],
        )
        self._events = {
            name: counter(name=f"vllm:cacheblend_{name}", documentation=text, labelnames=labelnames)
            for name, text in _EVENTS.items()
        }
        self._seconds = {
            part: histogram(
                name=f"vllm:cacheblend_{part}_seconds",
                documentation=f"Time to {part}, of a blend",
                buckets=SECONDS,
                labelnames=labelnames,
            )
            for part in _PARTS
        }
        self._ttft = histogram(
            name="vllm:cacheblend_ttft_seconds",
            documentation="Time to first token by how the prompt was read",
            buckets=SECONDS,
            labelnames=[*labelnames, "decision"],
        )
        self._read = {
            f"read-{unit}": counter(
                name=f"vllm:cacheblend_read_{unit}",
                documentation=f"{text}, by where it was",
                labelnames=[*labelnames, "tier"],
            )
            for unit, text in _READ.items()
        }
        self._deviations = {
            name: histogram(
                name=f"vllm:cacheblend_deviation_{name}",
                documentation=f"{text} of the squared distances between fresh and cached values, of a traced blend",
                buckets=SQUARED_DISTANCES,
                labelnames=labelnames,
            )
            for name, text in DEVIATIONS.items()
        }
        for labels in per_engine_labelvalues.values():  # from 0 on, or a rate would not see the first one
            for event in self._events.values():
                event.labels(*labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add a report."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            kind, _, rest = name.partition("_")
            if kind == "requests":
                self._requests.labels(*labels, rest).inc(value)
            elif kind == "tokens":
                self._tokens.labels(*labels, rest).inc(value)
            elif kind == "seconds":
                for seconds in value:
                    self._seconds[rest].labels(*labels).observe(seconds)
            elif kind == "ttft":
                for seconds in value:
                    self._ttft.labels(*labels, rest).observe(seconds)
            elif kind == "deviation":
                for deviation in value:
                    self._deviations[rest].labels(*labels).observe(deviation)
            elif kind in self._read:
                self._read[kind].labels(*labels, rest).inc(value)
            else:
                self._events[name].labels(*labels).inc(value)
