"""Metrics and spans of an engine."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from cacheblend_rag.diagnostics.prometheus import PrometheusMetrics
from cacheblend_rag.diagnostics.spans import Spans
from cacheblend_rag.diagnostics.timeline import parts_of
from cacheblend_rag.stats import PARTS, BlendStats

from .conftest import Case


@pytest.fixture
def observed(case: Case) -> Iterator[Case]:
    """A case whose observers go again."""
    yield case
    case.engine._observers = ()


def answer_all(case: Case) -> list[BlendStats]:
    """A blend, a plain prefill, and a blend that is streamed."""
    stats = [case.engine.generate(case.prompt(1), max_tokens=2).stats]
    stats.append(case.engine.generate(case.prompt(1), max_tokens=2, blend={"mode": "off"}).stats)
    *_, last = case.engine.stream(case.prompt(2), max_tokens=2)
    assert last.generation is not None
    return [*stats, last.generation.stats]


def test_metrics_add_up(observed: Case) -> None:
    registry = CollectorRegistry()
    observed.engine.add_observer(PrometheusMetrics(observed.engine, registry))
    stats = answer_all(observed)
    labels = {"model": observed.engine.model_name, "namespace": observed.engine.scope.namespace}

    def value(name: str, **more: str) -> float | None:
        return registry.get_sample_value(name, labels | more)

    assert value("cacheblend_requests_total", decision="blend") == 2
    assert value("cacheblend_requests_total", decision="prefill") == 1
    for source in ("prefix", "reused", "recomputed", "missed"):
        expected = sum(getattr(one, f"{source}_tokens") for one in stats)
        assert value("cacheblend_prompt_tokens_total", source=source) == expected
    assert value("cacheblend_chunk_faults_total") == 0
    assert value("cacheblend_ttft_seconds_sum", decision="blend") == pytest.approx(stats[0].ttft + stats[2].ttft)
    for part in PARTS:
        assert value(f"cacheblend_{part}_seconds_count") == 2
        expected = getattr(stats[0], part) + getattr(stats[2], part)
        assert value(f"cacheblend_{part}_seconds_sum") == pytest.approx(expected)
    shares = [one.recomputed_tokens / (one.recomputed_tokens + one.reused_tokens) for one in (stats[0], stats[2])]
    assert value("cacheblend_recomputed_ratio_sum") == pytest.approx(sum(shares))
    read = sum(one.read_bytes["memory"] for one in (stats[0], stats[2]))
    assert value("cacheblend_read_bytes_total", tier="memory") == read > 0
    seconds = sum(one.read_seconds["memory"] for one in (stats[0], stats[2]))
    assert value("cacheblend_read_seconds_total", tier="memory") == pytest.approx(seconds)
    assert value("cacheblend_read_bytes_total", tier="disk") is None


def test_deviations_of_traced_blends_are_exported(observed: Case) -> None:
    registry, exporter, provider = CollectorRegistry(), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observed.engine.add_observer(PrometheusMetrics(observed.engine, registry))
    observed.engine.add_observer(Spans(observed.engine, provider))
    blend = {"policy": "hkvd", "check_layers": (0, 1)}
    told = observed.engine.generate(observed.prompt(1), max_tokens=1, blend=blend, trace=True)
    assert observed.engine.generate(observed.prompt(1), max_tokens=1, blend=blend).stats.deviation == {}
    assert told.trace is not None
    measured = told.trace.deviations[0]  # of all that matched; layer 1 is looked at for some of them only
    assert len(measured.values) == told.stats.reused_tokens + told.stats.recomputed_tokens
    assert told.stats.deviation["mean"] == pytest.approx(measured.values.mean(), rel=1e-5)
    assert told.stats.deviation["p95"] == pytest.approx(np.percentile(measured.values, 95), rel=1e-5)
    labels = {"model": observed.engine.model_name, "namespace": observed.engine.scope.namespace}
    for name, value in told.stats.deviation.items():
        assert registry.get_sample_value(f"cacheblend_deviation_{name}_count", labels) == 1
        assert registry.get_sample_value(f"cacheblend_deviation_{name}_sum", labels) == value
    whole = [span for span in exporter.get_finished_spans() if span.name == "cacheblend.ttft"]
    assert [(span.attributes or {}).get("cacheblend.deviation.p95") for span in whole] == [
        told.stats.deviation["p95"],
        None,
    ]


def test_spans_are_inside_each_other(observed: Case) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observed.engine.add_observer(Spans(observed.engine, provider))
    before = time.time()
    with provider.get_tracer("test").start_as_current_span("request") as request:
        stats = observed.engine.generate(observed.prompt(1), max_tokens=9).stats
    spans = {span.name: span for span in exporter.get_finished_spans()}
    whole = spans["cacheblend.ttft"]
    assert whole.parent is not None
    assert whole.parent.span_id == request.get_span_context().span_id
    assert whole.attributes is not None
    assert whole.attributes["cacheblend.recomputed_tokens"] == stats.recomputed_tokens
    assert whole.attributes["cacheblend.decision"] == "blend"
    assert whole.attributes["cacheblend.read_bytes.memory"] == stats.read_bytes["memory"]
    assert whole.attributes["cacheblend.read_seconds.memory"] == stats.read_seconds["memory"]
    assert whole.start_time is not None and whole.end_time is not None
    assert whole.end_time - whole.start_time == pytest.approx(stats.ttft * 1e9, abs=1e4)
    assert before - 0.01 < whole.start_time / 1e9 < whole.end_time / 1e9 < time.time()  # before the other 8 tokens
    parts = [spans[f"cacheblend.{part}"] for part, seconds in parts_of(stats).items() if seconds > 0]
    assert len(parts) >= 4
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == whole.context.span_id
    for earlier, later in itertools.pairwise(parts):
        assert earlier.end_time == later.start_time
    assert parts[0].start_time == whole.start_time


async def test_spans_of_coroutines_belong_to_theirs(observed: Case) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observed.engine.add_observer(Spans(observed.engine, provider))
    for number in range(2):
        with provider.get_tracer("test").start_as_current_span("request") as request:
            if number:
                assert [piece async for piece in observed.engine.astream(observed.prompt(1), max_tokens=2)]
            else:
                await observed.engine.agenerate(observed.prompt(1), max_tokens=2)
        whole = [span for span in exporter.get_finished_spans() if span.name == "cacheblend.ttft"][-1]
        assert whole.parent is not None
        assert whole.parent.span_id == request.get_span_context().span_id


def test_what_was_lost_has_no_spans(observed: Case) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Spans(observed.engine, provider)(BlendStats(5, reason="lost"))
    assert exporter.get_finished_spans() == ()


def test_answers_do_not_suffer_from_observers(observed: Case, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[BlendStats] = []

    def fail(stats: BlendStats) -> None:
        raise RuntimeError("injected")

    observed.engine.add_observer(fail)
    observed.engine.add_observer(seen.append)
    with caplog.at_level(logging.ERROR):
        answer = observed.engine.generate(observed.prompt(1), max_tokens=2)
    assert seen == [answer.stats]
    assert [record.message for record in caplog.records] == ["an observer of the engine failed"]
