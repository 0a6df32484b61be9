"""What an engine's guard has found, for Prometheus: asked for at every scrape; needs the extra ``metrics``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from cacheblend_rag.engines.base import Engine

_LABELS = ("model", "namespace")


class GuardCollector(Collector):
    """The guard of one engine; nothing where it has none.

    Args:
        engine: Names the labels, too.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)  # a registry lives longer than an engine
        self._values = (engine.model_name, engine.scope.namespace)

    def collect(self) -> Iterator[Metric]:
        """See the base class."""
        engine = self._engine()
        if engine is None or engine.guard is None:
            return
        report, values = engine.guard.report(), self._values
        counts = {"compared": report.compared, "dropped": report.dropped, "failed": report.failed}
        answers = CounterMetricFamily(
            "cacheblend_guard_answers",
            "Answers that the guard took up, by what became of it",
            labels=(*_LABELS, "outcome"),
        )
        for outcome, count in counts.items():
            answers.add_metric((*values, outcome), count)
        yield answers
        yield self._gauge(
            "least_ratio", "Least recompute ratio that the guard allows; 1: blending is off", report.least_ratio
        )
        if report.mean_kl is not None:
            text = "KL divergence of the last blended answers from full prefill, nats a token (at least, on vLLM)"
            yield self._gauge("mean_kl_nats", text, report.mean_kl)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"cacheblend_guard_{name}", text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family
