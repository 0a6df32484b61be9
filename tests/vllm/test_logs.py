"""A line for each prompt, for debugging, and what observers see."""

from __future__ import annotations

import logging
import re
import time

import pytest

from cacheblend_rag import Generation
from cacheblend_rag.recording import Recorder
from cacheblend_rag.stats import BlendStats

from .conftest import Case, connectors


def test_a_line_for_each_prompt(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    prompt = case.prompt(90)
    with caplog.at_level(logging.DEBUG, "cacheblend_rag"):
        blended = case.engine.generate(prompt, max_tokens=2)
        case.engine.generate(case.prompt(91), max_tokens=2, blend={"mode": "off"})
    assert blended.trace is None
    stats = blended.stats
    lines = [record.getMessage() for record in caplog.records if "matched tokens" in record.getMessage()]
    assert len(lines) == 2
    matched = stats.reused_tokens + stats.recomputed_tokens
    assert f": blend ({stats.reason}): {stats.recomputed_tokens} of {matched} matched tokens recomputed" in lines[0]
    low, high = map(float, re.search(r"by query_aware, scores (\S+) to (\S+),", lines[0]).groups())  # type: ignore[union-attr]
    assert 0 < low < high
    assert ": prefill (mode is off): 0 of 0 matched tokens recomputed, " in lines[1]


def test_a_trace_that_fails_costs_no_answer(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(Recorder, "trace", fail)
    answer = case.engine.generate(case.prompt(96), max_tokens=2, trace=True)
    assert answer.trace is None
    assert answer.stats.decision == "blend"
    assert answer.stats.recomputed_tokens > 20
    assert "a blend could not be traced" in caplog.text


def test_only_the_last_traces_are_remembered(case: Case) -> None:
    scheduler = connectors(case.engine)[0]._scheduler
    before = len(scheduler._finished)
    for seed in range(100, 120):
        assert case.engine.generate(case.prompt(seed), max_tokens=1, trace=True).trace is not None
    assert len(scheduler._traces) == 16
    assert len(scheduler._finished) == before + 20
    assert not any("trace" in stats for stats in scheduler._finished.values())


def test_observers_see_every_answer(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.engine, "_observers", ())
    seen: list[BlendStats] = []
    before = time.time() - 0.01
    case.engine.add_observer(seen.append)
    answers = case.engine.generate([case.prompt(93), case.prompt(94)], max_tokens=2)
    *_, last = case.engine.stream(case.prompt(95), max_tokens=2)
    assert last.generation is not None
    assert seen == [*(answer.stats for answer in answers), last.generation.stats]
    assert seen[0].ttft > 0
    assert before <= seen[0].started < seen[0].started + seen[0].ttft < time.time()


def test_nothing_is_measured_for_a_log_that_nobody_keeps(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "cacheblend_rag"):
        case.engine.generate(case.prompt(92), max_tokens=1)
    assert [record for record in caplog.records if record.name.startswith("cacheblend_rag")] == []


def test_a_guard_compares_answers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case.engine, "_observers", ())
    seen: list[BlendStats] = []
    case.engine.add_observer(seen.append)
    case.engine.watch(1.0)
    guard = case.engine.guard
    assert guard is not None
    counted = case.engine.counts.total()
    try:
        found = []
        for seed, mode, ratio in ((130, "auto", 0.0), (132, "blend", 0.0), (131, "blend", 1.0)):
            blend = {"mode": mode, "recompute_ratio": ratio, "min_reused_tokens": 8}
            answer = case.engine.generate(case.prompt(seed), max_tokens=5, blend=blend)
            assert answer.stats.decision == "blend"
            until = time.monotonic() + 60
            while guard.report().compared == len(found):
                assert guard.report().failed == guard.report().dropped == 0
                assert time.monotonic() < until
                time.sleep(0.01)
            found.append(guard._found[ratio][-1])
        assert min(found[:2]) > 1e-4
        assert found[2] < 1e-5  # recomputing everything is full prefill
        assert len(seen) == 3  # what the guard asks is not among the answers
        assert case.engine.counts.total() == counted + 3
    finally:
        guard.close()
        case.engine.guard = None


@pytest.mark.parametrize("seed", [140, 141])
def test_a_guard_changes_no_later_answer(case: Case, seed: int) -> None:
    """Full prefill's blocks in the prefix cache would: the next such prompt would go on from them."""
    blend = {"mode": "auto", "recompute_ratio": 0.0, "min_reused_tokens": 8}

    def ask() -> Generation:
        return case.engine.generate(case.prompt(seed), max_tokens=3, blend=blend, logprobs=3)

    if seed == 141:
        case.engine.watch(1.0)
    guard = case.engine.guard
    first = ask()
    if guard is not None:
        until = time.monotonic() + 60
        while not guard.report().compared:
            assert time.monotonic() < until
            time.sleep(0.01)
        guard.close()
        case.engine.guard = None
    again = ask()
    assert again.token_ids == first.token_ids
    for one, other in zip(again.logprobs or [], first.logprobs or [], strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    assert again.stats.prefix_tokens > first.stats.prefix_tokens  # blended blocks
