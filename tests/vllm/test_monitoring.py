"""The dashboard and the alerts ask for what vLLM's servers export."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from monitoring import DASHBOARD, EVERYTHING, Samples, exported, queries, unknown
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cacheblend_rag.vllm.metrics import BlendMetrics, BlendPromMetrics


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """What a server exports before its first request, and after some."""
    registry = CollectorRegistry()

    def made(kind: type[Counter | Gauge | Histogram]) -> object:
        return lambda **arguments: kind(**arguments, registry=registry)

    config = SimpleNamespace(kv_transfer_config=None)
    kinds = {kind: made(kind) for kind in (Counter, Gauge, Histogram)}
    exporter = BlendPromMetrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    before = generate_latest(registry).decode()
    metrics = BlendMetrics()
    for stats in EVERYTHING:
        metrics.observe(stats)
    exporter.observe(metrics.data, 1)
    exporter.observe(metrics.aggregate(BlendMetrics(data=dict(metrics.data))).data, 0)
    return [before, generate_latest(registry).decode()]


def test_queries_ask_for_what_is_exported(texts: list[str]) -> None:
    known = exported(texts[1])
    asked = {name: unknown(query, known, "vllm:cacheblend_") for name, query in queries()}
    assert {name: what for name, what in asked.items() if what} == {}


def test_every_metric_is_on_the_dashboard(texts: list[str]) -> None:
    text = DASHBOARD.read_text("utf-8")
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in exported(texts[1])}
    assert len(families) > 12
    assert [name for name in sorted(families) if name not in text] == []


def test_values_are_those_of_the_stats(texts: list[str]) -> None:
    def value(sample: str) -> float:
        (line,) = [line for line in texts[1].splitlines() if line.startswith(f"{sample} ")]
        return float(line.rsplit(" ", 1)[1])

    one = 'engine="1",model_name="m"'
    blend = EVERYTHING[0]
    for tier, nbytes in blend.read_bytes.items():
        assert value(f'vllm:cacheblend_read_bytes_total{{{one},tier="{tier}"}}') == nbytes
    assert value(f'vllm:cacheblend_read_seconds_total{{{one},tier="disk"}}') == blend.read_seconds["disk"]
    assert value('vllm:cacheblend_read_bytes_total{engine="0",model_name="m",tier="gpu"}') == 200  # of two reports
    assert value(f"vllm:cacheblend_deviation_p95_sum{{{one}}}") == blend.deviation["p95"]
    assert value(f'vllm:cacheblend_ttft_seconds_sum{{decision="prefill",{one}}}') == EVERYTHING[1].ttft
    assert value(f"vllm:cacheblend_load_seconds_count{{{one}}}") == 1


def test_faults_are_exported_before_the_first(texts: list[str]) -> None:
    """Or no rate would see it."""
    known: Samples = exported(texts[0])
    for name in ("chunk_faults", "blend_faults", "errors", "slow_chunks", "warmed_chunks"):
        assert known[f"vllm:cacheblend_{name}_total"]["engine"] == {"0", "1"}
