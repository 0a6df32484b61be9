"""The trace file adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.diagnostics.timeline import parts_of, timeline, write_timeline
from cacheblend_rag.stats import PARTS, BlendStats

seconds = st.floats(0, 100)
read = st.builds(
    lambda parts, rest: BlendStats(9, **parts, ttft=sum(parts.values()) + rest),
    st.fixed_dictionaries(dict.fromkeys(PARTS, seconds)),
    seconds,
)


@given(read)
def test_the_parts_are_all_of_it(stats: BlendStats) -> None:
    parts = parts_of(stats)
    assert list(parts) == ["match", "rest", "load", "select", "recompute", "first_token"]
    assert sum(parts.values()) == pytest.approx(stats.ttft, abs=1e-9)
    assert all(parts[part] == getattr(stats, part) for part in PARTS)


def test_what_was_measured_by_two_clocks_gives_no_negative_rest() -> None:
    assert parts_of(BlendStats(9, match=1.0, load=2.0, ttft=2.5))["rest"] == 0


@given(st.dictionaries(st.text(min_size=1), read, max_size=3))
def test_events_follow_each_other_inside_their_prompt(prompts: dict[str, BlendStats]) -> None:
    events = timeline(prompts)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(names.values()) == list(prompts)
    for track, name in names.items():
        whole, *parts = [event for event in events if event["tid"] == track and event["ph"] == "X"]
        assert (whole["name"], whole["ts"]) == ("ttft", 0)
        assert whole["dur"] == pytest.approx(1e6 * prompts[name].ttft, abs=1)
        assert whole["args"]["prompt_tokens"] == 9
        ends = 0.0
        for part in parts:
            assert part["ts"] == pytest.approx(ends, abs=0.1)
            ends = part["ts"] + part["dur"]
        assert ends == pytest.approx(whole["dur"], abs=0.1)


def test_the_file_is_json(tmp_path: Path) -> None:
    prompts = {"an answer": BlendStats(9, match=0.001, ttft=0.001)}
    write_timeline(prompts, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == timeline(prompts)
    with pytest.raises(OSError, match="No such file"):
        write_timeline(prompts, tmp_path / "nowhere" / "trace.json")
