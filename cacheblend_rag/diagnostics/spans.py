"""OpenTelemetry spans of how prompts were read; needs the extra ``tracing``.

from cacheblend_rag.diagnostics.spans import Spans

engine.add_observer(Spans(engine))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import trace
except ImportError as error:
    raise ImportError("Spans needs opentelemetry-api: pip install 'cacheblend-rag[tracing]'") from error

from cacheblend_rag.diagnostics.timeline import parts_of
from cacheblend_rag.stats import BlendStats

if TYPE_CHECKING:
    from cacheblend_rag.engines.base import Engine

_NANO = 1e9


class Spans:
    """Observes one engine: a span ``cacheblend.ttft`` for each prompt, and one inside it for each part of its time.

    They are made once the answer is complete, with the times that were measured, and belong to the span that is current
    then in the thread that reads the answer.

    Args:
        engine: Names the attributes ``cacheblend.model`` and ``cacheblend.namespace``.
        tracer_provider: None: the global one.
    """

    def __init__(self, engine: Engine, tracer_provider: trace.TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("cacheblend_rag", tracer_provider=tracer_provider)
        self._common = {"cacheblend.model": engine.model_name, "cacheblend.namespace": engine.scope.namespace}

    def __call__(self, stats: BlendStats) -> None:
        """Make the spans of a prompt that was read; none if its times are lost."""
        if not stats.started:
            return
        begin = int(stats.started * _NANO)
        whole = self._tracer.start_span(
            "cacheblend.ttft", start_time=begin, attributes={**self._common, **_attributes(stats)}
        )
        inside = trace.set_span_in_context(whole)
        at = begin
        for part, seconds in parts_of(stats).items():
            until = at + int(seconds * _NANO)
            if seconds > 0:
                self._tracer.start_span(f"cacheblend.{part}", context=inside, start_time=at).end(until)
            at = until
        whole.end(begin + int(stats.ttft * _NANO))


def _attributes(stats: BlendStats) -> dict[str, Any]:
    """The fields of stats by name; an attribute holds no dict, so its values have names of their own."""
    found: dict[str, Any] = {}
    for name, value in stats.to_dict().items():
        if isinstance(value, dict):
            found.update({f"cacheblend.{name}.{key}": inner for key, inner in value.items()})
        else:
            found[f"cacheblend.{name}"] = value
    return found
