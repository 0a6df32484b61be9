"""What a guard decides from what it is told, and how far distributions are apart of which only the top is known."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import BlendConfig, ConfigError
from cacheblend_rag.divergence import divergence_of_tops
from cacheblend_rag.guard import TURNED_OFF, Answered, Guard
from cacheblend_rag.stats import BlendStats

BLENDED = BlendStats(100, decision="blend")


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def show(guard: Guard, config: BlendConfig, divergences: Iterable[float], told: list[float]) -> None:
    """Answers one after the other, each as far from full prefill as it says."""
    for kl in divergences:
        report = guard.report()
        told.append(kl)
        guard.saw(Answered([1], [2], config), BLENDED)
        wait_for(lambda report=report: guard.report().compared > report.compared)  # type: ignore[misc]


@pytest.fixture
def told() -> list[float]:
    return []


@pytest.fixture
def guard(told: list[float]) -> Guard:
    return Guard(lambda answered: told.pop(0), share=1.0)


def test_answers_that_are_too_far_raise_the_ratio_and_then_turn_blending_off(
    guard: Guard, told: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    default, more, auto = BlendConfig(), BlendConfig(recompute_ratio=0.6), BlendConfig(recompute_ratio="auto")
    assert guard.adjust(default) is default
    show(guard, default, [0.3] * 7, told)
    assert guard.report().least_ratio == 0  # too few to say
    show(guard, default, [0.3], told)
    assert guard.report().least_ratio == 0.25
    assert guard.report().mean_kl is None  # what was found at another ratio doesn't count
    assert guard.adjust(default).recompute_ratio == 0.25
    assert guard.adjust(more) is more
    assert guard.adjust(auto).ratio_range == (0.25, 0.5)
    assert guard.adjust(BlendConfig(mode="off")) == BlendConfig(mode="off")
    show(guard, default, [0.3] * 8, told)
    assert guard.adjust(default).recompute_ratio == 0.5
    assert guard.adjust(auto).ratio_range == (0.5, 0.5)
    assert guard.adjust(more) is more
    caplog.clear()
    show(guard, default, [0.3] * 8, told)
    assert guard.adjust(default).mode == guard.adjust(more).mode == guard.adjust(auto).mode == "off"
    (record,) = caplog.records
    assert "0.300 nats a token" in record.getMessage()
    assert "blending is turned off" in record.getMessage()
    stats = BlendStats(100, decision="prefill", reason="mode is off")
    guard.saw(Answered([1], [2], default), stats)
    assert stats.reason == TURNED_OFF
    guard.reset()
    assert guard.adjust(default) is default


def test_answers_that_are_near_change_nothing(guard: Guard, told: list[float]) -> None:
    show(guard, BlendConfig(), [0.09] * 100, told)
    report = guard.report()
    assert (report.compared, report.failed, report.dropped, report.least_ratio) == (100, 0, 0, 0)
    assert report.mean_kl == pytest.approx(0.09)


def test_one_answer_that_is_far_may_be_chance(guard: Guard, told: list[float]) -> None:
    show(guard, BlendConfig(), [0.02] * 7 + [2.0] + [0.02] * 20, told)
    assert guard.report().least_ratio == 0


def test_the_latest_answers_count(guard: Guard, told: list[float]) -> None:
    show(guard, BlendConfig(), [0.0] * 200 + [0.5] * 40, told)
    assert guard.report().least_ratio > 0


def test_no_number_is_as_wrong_as_can_be(guard: Guard, told: list[float]) -> None:
    show(guard, BlendConfig(), [math.nan] * 8, told)
    assert guard.report().least_ratio == 0.25


def test_what_was_answered_at_another_ratio_does_not_count() -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def compare(answered: Answered) -> float:
        begun.release()
        assert go_on.acquire(timeout=30)
        return 0.3

    guard = Guard(compare, share=1.0)
    for count in range(8):  # the second waits while the first is compared, and so on: the last one is of the old ratio
        guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
        if count:
            go_on.release()
        assert begun.acquire(timeout=30)
    guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
    go_on.release()
    assert begun.acquire(timeout=30)
    assert guard.report().least_ratio == 0.25
    go_on.release()
    wait_for(lambda: guard.report().compared == 9)
    assert guard.report().mean_kl is None
    guard.close()


def test_a_share_of_the_answers_is_compared() -> None:
    guard = Guard(lambda answered: 0.0, share=0.2)
    guard._random.seed(0)
    for _ in range(1000):
        guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
        wait_for(lambda: guard._waiting.empty())
    wait_for(lambda: guard.report().compared + guard.report().dropped > 150)
    assert 150 < guard.report().compared + guard.report().dropped < 250


@pytest.mark.parametrize(
    ("answered", "stats"),
    [
        (Answered([1], [], BlendConfig()), BLENDED),  # nothing was answered
        (Answered([1], [2], BlendConfig()), BlendStats(100, decision="prefill")),
        (Answered([1], [2], BlendConfig()), BlendStats(100, decision="prefix")),
    ],
)
def test_what_was_not_blended_is_not_compared(guard: Guard, answered: Answered, stats: BlendStats) -> None:
    guard.saw(answered, stats)
    assert guard._thread is None


def test_nobody_waits_for_a_guard_that_is_busy() -> None:
    busy = threading.Event()
    guard = Guard(lambda answered: float(busy.wait(30)) * 0, share=1.0)
    for _ in range(20):
        guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
    assert guard.report().dropped >= 17  # one is compared, two wait
    busy.set()
    wait_for(lambda: guard.report().compared + guard.report().dropped == 20)


def test_a_comparison_that_fails_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    def compare(answered: Answered) -> float:
        raise RuntimeError("no such server")

    guard = Guard(compare, share=1.0)
    for expected in (1, 2):
        guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
        wait_for(lambda expected=expected: guard.report().failed == expected)  # type: ignore[misc]
    assert "no such server" in caplog.text
    assert guard.report().compared == 0


def test_after_it_is_closed_nothing_is_compared(guard: Guard, told: list[float]) -> None:
    show(guard, BlendConfig(), [0.0], told)
    for _ in range(3):
        guard.close()
    assert guard._thread is not None
    assert not guard._thread.is_alive()
    guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
    assert guard._waiting.qsize() <= 1  # what ended the thread


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan, True, "0.1"])
def test_a_share_is_a_share(share: object) -> None:
    with pytest.raises(ConfigError, match=r"guard must be a share of the answers in \(0, 1\]"):
        Guard(lambda answered: 0.0, share)  # type: ignore[arg-type]


logits = st.lists(st.floats(-8, 8), min_size=12, max_size=12)


def top(probabilities: Sequence[float], count: int) -> dict[int, float]:
    order = np.argsort(probabilities)[::-1][:count]
    return {int(token): float(np.log(probabilities[token])) for token in order}


@given(logits, logits, st.integers(1, 12), st.integers(1, 12))
def test_what_is_known_of_a_divergence(one: list[float], other: list[float], kept: int, kept_of_other: int) -> None:
    p, q = (np.exp(values) / np.exp(values).sum() for values in (np.array(one), np.array(other)))
    whole = float((p * (np.log(p) - np.log(q))).sum())
    assert 0 <= divergence_of_tops(top(p, kept), top(q, kept_of_other)) <= whole + 1e-4
    assert divergence_of_tops(top(p, 12), top(q, 12)) == pytest.approx(whole, abs=1e-4)
    assert divergence_of_tops(top(p, kept), top(p, kept)) == pytest.approx(0, abs=1e-6)


def test_distributions_that_share_no_top_token_are_far_apart() -> None:
    found = divergence_of_tops({1: math.log(0.9)}, {2: math.log(0.9)})
    assert found == pytest.approx(0.9 * math.log(0.9 / 0.1) + 0.1 * math.log(0.1 / 0.9))
    found = divergence_of_tops({1: math.log(0.99)}, {2: math.log(0.5), 3: math.log(0.001)})
    assert found == pytest.approx(0.99 * math.log(0.99 / 0.001) + 0.01 * math.log(0.01 / 0.999))
