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
from cacheblend_rag.guard import TURNED_OFF, Answered, Guard, TurnedOff
from cacheblend_rag.stats import BlendStats

BLENDED = BlendStats(100, decision="blend")


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def show(guard: Guard, config: BlendConfig, divergences: Iterable[float], told: list[float | None]) -> None:
    """Answers one after the other, each as far from full prefill as it says, as the guard adjusts the settings."""
    for kl in divergences:
        before = guard.report()
        told.append(kl)
        guard.saw(Answered([1], [2], guard.adjust(config)), BLENDED)
        wait_for(lambda before=before: guard.report().compared > before.compared)  # type: ignore[misc]


@pytest.fixture
def told() -> list[float | None]:
    return []


@pytest.fixture
def guard(told: list[float | None]) -> Guard:
    return Guard(lambda answered: told.pop(0), share=1.0)


def test_answers_that_are_too_far_raise_the_ratio_and_then_turn_blending_off(
    guard: Guard, told: list[float | None], caplog: pytest.LogCaptureFixture
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
    assert "at recompute_ratio 0.5 are 0.300 nats a token" in record.getMessage()
    assert "blending is turned off" in record.getMessage()
    guard.reset()
    assert guard.adjust(default) is default


def test_only_who_would_have_been_blended_is_told_of_the_guard(guard: Guard, told: list[float | None]) -> None:
    show(guard, BlendConfig(), [0.3] * 24, told)
    off = guard.adjust(BlendConfig())
    assert off.to_dict() == BlendConfig(mode="off").to_dict()
    for config, reason in ((off, TURNED_OFF), (guard.adjust(BlendConfig(mode="off")), "mode is off")):
        stats = BlendStats(100, decision="prefill", reason="mode is off")
        guard.saw(Answered([1], [2], config), stats)
        assert stats.reason == reason
    assert isinstance(off, TurnedOff)
    assert guard.adjust(BlendConfig(recompute_ratio=1.0)).mode == "auto"  # full prefill by itself


def test_a_raise_is_one_that_changes_something(guard: Guard, told: list[float | None]) -> None:
    some = BlendConfig(recompute_ratio=0.3)
    show(guard, some, [0.3] * 8, told)
    assert guard.report().least_ratio == 0.5
    assert guard.adjust(some).recompute_ratio == 0.5


def test_answers_of_other_ratios_are_judged_by_themselves(guard: Guard, told: list[float | None]) -> None:
    for _ in range(8):
        show(guard, BlendConfig(), [0.5], told)
        show(guard, BlendConfig(recompute_ratio=1.0), [0.0], told)  # would have hidden them
    assert guard.report().least_ratio == 0.25
    assert guard.report().mean_kl == 0.0  # those of ratio 1 are left
    show(guard, BlendConfig(recompute_ratio=1.0), [5.0] * 20, told)
    assert guard.report().least_ratio == 0.25  # whatever it is: there is no more to recompute


def test_answers_that_are_near_change_nothing(guard: Guard, told: list[float | None]) -> None:
    show(guard, BlendConfig(), [0.09] * 100, told)
    report = guard.report()
    assert (report.compared, report.failed, report.dropped, report.least_ratio) == (100, 0, 0, 0)
    assert report.mean_kl == pytest.approx(0.09)


def test_a_few_answers_that_are_far_may_be_chance(guard: Guard, told: list[float | None]) -> None:
    show(guard, BlendConfig(), [0.02] * 7 + [2.0] + [0.02] * 20 + [1.0, 0.02, 1.5] + [0.02] * 20, told)
    assert guard.report().least_ratio == 0


def test_means_as_large_as_allowed_are_left_alone(guard: Guard, told: list[float | None]) -> None:
    values = np.random.default_rng(0).exponential(0.09, 400)
    show(guard, BlendConfig(), values.tolist(), told)
    assert guard.report().least_ratio == 0


def test_the_latest_answers_count(guard: Guard, told: list[float | None]) -> None:
    show(guard, BlendConfig(), [0.0] * 200 + [0.5] * 100, told)
    assert guard.report().least_ratio > 0


def test_no_number_is_as_wrong_as_can_be(guard: Guard, told: list[float | None]) -> None:
    show(guard, BlendConfig(), [math.nan] * 8, told)
    assert guard.report().least_ratio == 0.25


def test_what_was_answered_at_another_ratio_does_not_count(guard: Guard, told: list[float | None]) -> None:
    """Such as long answers that began before the ratio was raised."""
    began = guard.adjust(BlendConfig())
    show(guard, BlendConfig(), [0.3] * 8, told)
    assert guard.report().least_ratio == 0.25
    for count in range(20):
        told.append(0.5)
        guard.saw(Answered([1], [2], began), BLENDED)
        wait_for(lambda count=count: guard.report().dropped == count + 1)  # type: ignore[misc]
    assert guard.report().least_ratio == 0.25
    assert guard.report().compared == 8


def test_prompts_that_are_not_blended_any_more_are_not_compared(guard: Guard, told: list[float | None]) -> None:
    told.append(None)
    guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
    wait_for(lambda: guard.report().dropped == 1)
    assert (guard.report().compared, guard.report().mean_kl) == (0, None)


def test_the_tokens_of_an_answer_are_the_users(told: list[float | None]) -> None:
    seen: list[Answered] = []
    guard = Guard(lambda answered: seen.append(answered) or 0.0, share=1.0)  # type: ignore[func-returns-value]
    tokens = [2, 3]
    guard.saw(Answered([1], tokens, BlendConfig()), BLENDED)
    tokens.clear()
    wait_for(lambda: bool(seen))
    assert list(seen[0].token_ids) == [2, 3]


def test_no_thread_costs_no_answer(monkeypatch: pytest.MonkeyPatch, guard: Guard) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
    guard.close()
    guard.close()


def test_closing_while_it_compares() -> None:
    for _ in range(200):
        guard = Guard(lambda answered: 0.0, share=1.0)
        for _ in range(3):
            guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
        guard.close()
        assert guard._thread is not None
        assert not guard._thread.is_alive()


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


def test_comparisons_that_fail_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def compare(answered: Answered) -> float:
        raise RuntimeError("no such server")

    guard = Guard(compare, share=1.0)
    for expected in (1, 2):
        guard.saw(Answered([1], [2], BlendConfig()), BLENDED)
        wait_for(lambda expected=expected: guard.report().failed == expected)  # type: ignore[misc]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such server" in caplog.text
    assert guard.report().compared == 0


def test_after_it_is_closed_nothing_is_compared(guard: Guard, told: list[float | None]) -> None:
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
