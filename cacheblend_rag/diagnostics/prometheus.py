"""Metrics of an engine for Prometheus; needs the extra ``metrics``.

    from cacheblend_rag.diagnostics.prometheus import PrometheusMetrics

    engine.add_observer(PrometheusMetrics(engine))

A vLLM server with the connector has its own, ``vllm:cacheblend_*``, in vLLM's ``/metrics``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
except ImportError as error:
    raise ImportError("PrometheusMetrics needs prometheus-client: pip install 'cacheblend-rag[metrics]'") from error

from cacheblend_rag.diagnostics.prometheus_guard import GuardCollector
from cacheblend_rag.metric_figures import DEVIATIONS, SECONDS, SOURCES, SQUARED_DISTANCES
from cacheblend_rag.stats import PARTS, BlendStats

if TYPE_CHECKING:
    from cacheblend_rag.engines.base import Engine

_LABELS = ("model", "namespace")
_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)


class PrometheusMetrics:
    """Observes one engine; several engines of one process need registries of their own.

    Args:
        engine: Names the labels ``model`` and ``namespace``.
        registry: Where the metrics are.
    """

    def __init__(self, engine: Engine, registry: CollectorRegistry = REGISTRY) -> None:
        self._values = (engine.model_name, engine.scope.namespace)
        self._requests = Counter(
            "cacheblend_requests", "Requests by how their prompts were read", (*_LABELS, "decision"), registry=registry
        )
        self._tokens = Counter(
            "cacheblend_prompt_tokens",
            "Prompt tokens by where their KV came from",
            (*_LABELS, "source"),
            registry=registry,
        )
        self._faults = Counter(
            "cacheblend_chunk_faults", "Matched chunks that could not be read", _LABELS, registry=registry
        )
        self._ttft = Histogram(
            "cacheblend_ttft_seconds",
            "Time to first token by how the prompt was read",
            (*_LABELS, "decision"),
            buckets=SECONDS,
            registry=registry,
        )
        self._parts = {
            part: Histogram(
                f"cacheblend_{part}_seconds",
                f"Time to {part}, of a blend",
                _LABELS,
                buckets=SECONDS,
                registry=registry,
            )
            for part in PARTS
        }
        self._share = Histogram(
            "cacheblend_recomputed_ratio",
            "Share of a blend's matched tokens that was recomputed",
            _LABELS,
            buckets=_SHARES,
            registry=registry,
        )
        self._read_bytes = Counter(
            "cacheblend_read_bytes",
            "Bytes of chunk KV that prompts read, by where it was",
            (*_LABELS, "tier"),
            registry=registry,
        )
        self._read_seconds = Counter(
            "cacheblend_read_seconds",
            "Seconds that prompts' chunks took to be read, by where they were",
            (*_LABELS, "tier"),
            registry=registry,
        )
        self._deviations = {
            name: Histogram(
                f"cacheblend_deviation_{name}",
                f"{text} of the squared distances between fresh and cached values, of a traced blend",
                _LABELS,
                buckets=SQUARED_DISTANCES,
                registry=registry,
            )
            for name, text in DEVIATIONS.items()
        }
        registry.register(GuardCollector(engine))
        self._faults.labels(*self._values)  # from 0 on, or a rate would not see the first one

    def __call__(self, stats: BlendStats) -> None:
        """Count a prompt that was read."""
        self._requests.labels(*self._values, stats.decision).inc()
        for source in SOURCES:
            self._tokens.labels(*self._values, source).inc(getattr(stats, f"{source}_tokens"))
        self._faults.labels(*self._values).inc(stats.faults)
        if stats.ttft:  # or it is lost
            self._ttft.labels(*self._values, stats.decision).observe(stats.ttft)
        matched = stats.reused_tokens + stats.recomputed_tokens
        if stats.decision == "blend" and matched:
            self._share.labels(*self._values).observe(stats.recomputed_tokens / matched)
            for part, histogram in self._parts.items():
                histogram.labels(*self._values).observe(getattr(stats, part))
        for tier, nbytes in stats.read_bytes.items():
            self._read_bytes.labels(*self._values, tier).inc(nbytes)
            self._read_seconds.labels(*self._values, tier).inc(stats.read_seconds[tier])
        for name, value in stats.deviation.items():
            self._deviations[name].labels(*self._values).observe(value)
