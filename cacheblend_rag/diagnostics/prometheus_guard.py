"""What an engine's guard has found, for Prometheus: asked for at every scrape; needs the extra ``metrics``."""

from __future__ import annotations

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
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """See the base class."""
        if self._engine.guard is None:
            return
        report = self._engine.guard.report()
        values = (self._engine.model_name, self._engine.scope.namespace)
        counts = {"compared": report.compared, "dropped": report.dropped, "failed": report.failed}
        answers = CounterMetricFamily(
            "cacheblend_guard_answers",
            "Answers that the guard took up, by what became of it",
            labels=(*_LABELS, "outcome"),
        )
        for outcome, count in counts.items():
            answers.add_metric((*values, outcome), count)
        yield answers
        least = GaugeMetricFamily(
            "cacheblend_guard_least_ratio",
            "Least recompute ratio that the guard allows; 1: blending is off",
            labels=_LABELS,
        )
        least.add_metric(values, report.least_ratio)
        yield least
        if report.mean_kl is not None:
            mean = GaugeMetricFamily(
                "cacheblend_guard_mean_kl_nats",
                "KL divergence of blended answers from full prefill, per token, mean of the last ones",
                labels=_LABELS,
            )
            mean.add_metric(values, report.mean_kl)
            yield mean
