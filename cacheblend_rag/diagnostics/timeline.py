"""Where the time to the first token went, as a trace file that Perfetto and Chrome's ``about:tracing`` show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cacheblend_rag.stats import PARTS, BlendStats

REST = "rest"
"""What no part of the stats accounts for: waiting in an engine's queue, its own work around a step."""


def parts_of(stats: BlendStats) -> dict[str, float]:
    """Seconds of each part of the time to the first token, in order.

    They sum to it, but for what two clocks measured, a client's and a server's.
    """
    parts = {part: float(getattr(stats, part)) for part in PARTS}
    return {"match": parts.pop("match"), REST: max(stats.ttft - sum(parts.values()) - stats.match, 0.0), **parts}


def timeline(prompts: Mapping[str, BlendStats]) -> dict[str, Any]:
    """Some prompts as a document in the Trace Event Format, each a track that begins at 0.

    Args:
        prompts: How they were read, by the names of their tracks.
    """
    events: list[dict[str, Any]] = [_event("process_name", "M", 0, args={"name": "cacheblend"})]
    for track, (name, stats) in enumerate(prompts.items(), start=1):
        events.append(_event("thread_name", "M", track, args={"name": name}))
        args = stats.to_dict()
        events.append(_event("ttft", "X", track, ts=0.0, dur=_micros(stats.ttft), args=args))
        begins = 0.0
        for part, seconds in parts_of(stats).items():
            if seconds > 0:
                events.append(_event(part, "X", track, ts=_micros(begins), dur=_micros(seconds)))
            begins += seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_timeline(prompts: Mapping[str, BlendStats], path: Path) -> None:
    """Write :func:`timeline` to a file.

    Raises:
        OSError: the file can't be written.
    """
    path.write_text(json.dumps(timeline(prompts)) + "\n", "utf-8")


def _event(name: str, phase: str, track: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "ph": phase, "pid": 1, "tid": track, "cat": "cacheblend", **more}


def _micros(seconds: float) -> float:
    return round(1e6 * seconds, 3)
