"""How many tokens a budget pays for, and how many of them the scores take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import BlendConfig
from cacheblend_rag import budget as rule
from cacheblend_rag.budget import Budget, ratios

from .policies.conftest import FakeForward, make_layout

scores = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=80).map(torch.tensor)
limits = st.floats(0, 100)


@pytest.fixture(autouse=True)
def _share_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is tuned to."""
    monkeypatch.setattr(rule, "SHARE_LEFT", 0.5)


def auto(**settings: object) -> BlendConfig:
    return BlendConfig(recompute_ratio="auto", **settings)  # type: ignore[arg-type]


@given(st.integers(0, 10**6), st.integers(0, 100))
def test_a_fixed_ratio_is_the_floor_of_its_share(matched: int, percent: int) -> None:
    budget = Budget.of(matched, BlendConfig(recompute_ratio=percent / 100))
    assert budget.floor == budget.ceiling == percent * matched // 100


def test_the_range_gives_floor_and_ceiling() -> None:
    assert ratios(auto()) == (0.05, 0.5)
    assert Budget.of(199, auto()) == Budget(9, 99)
    assert Budget.of(199, auto(ratio_range=(0.1, 1))) == Budget(19, 199)
    assert Budget.of(199, BlendConfig(recompute_ratio=0.3, ratio_range=(0.1, 0.2))) == Budget(59, 59)


@pytest.mark.parametrize("policy", ["random", "chunk_heads", "none"])
def test_without_scores_auto_is_the_default_ratio(policy: str) -> None:
    assert ratios(auto(policy=policy)) == (0.15, 0.15)
    assert ratios(auto(policy=policy, ratio_range=(0.2, 0.3))) == (0.2, 0.2)
    assert ratios(auto(policy=policy, ratio_range=(0, 0.1))) == (0.1, 0.1)


@given(scores, limits, st.integers(0, 80), st.integers(0, 80))
def test_floor_and_ceiling_hold(scores: torch.Tensor, limit: float, a: int, b: int) -> None:
    for most_left in (limit, None):
        assert min(a, b) <= Budget(min(a, b), max(a, b)).spend(scores, most_left) <= max(a, b)


@given(scores, limits)
def test_the_fewest_are_taken_that_leave_little_enough(scores: torch.Tensor, limit: float) -> None:
    count = Budget(0, len(scores)).spend(scores, limit)
    ascending = scores.double().sort().values
    left = len(scores) - count
    assert float(ascending[:left].sum()) <= limit + 1e-9
    if count:
        assert float(ascending[: left + 1].sum()) > limit - 1e-9


@given(scores, limits, limits)
def test_less_may_be_left_more_is_taken(scores: torch.Tensor, a: float, b: float) -> None:
    budget = Budget(0, len(scores))
    assert budget.spend(scores, min(a, b)) >= budget.spend(scores, max(a, b))


@given(scores, st.sampled_from([2**-60, 2**-20, 2**20, 2**60]))
def test_without_a_limit_only_shares_count(scores: torch.Tensor, unit: float) -> None:
    budget, doubled = Budget(0, len(scores)), scores.double()
    assert budget.spend(doubled) == budget.spend(doubled * unit)


@given(scores, limits, st.randoms(use_true_random=False))
def test_the_order_of_the_tokens_does_not_count(scores: torch.Tensor, limit: float, random: object) -> None:
    shuffled = scores.tolist()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    budget = Budget(0, len(scores))
    for most_left in (limit, None):
        assert budget.spend(torch.tensor(shuffled), most_left) == budget.spend(scores, most_left)


def test_scores_of_zero_take_the_floor() -> None:
    for most_left in (0.0, 0.1, None):
        assert Budget(3, 9).spend(torch.zeros(12), most_left) == 3


def test_equal_scores_share_alike() -> None:
    assert Budget(0, 100).spend(torch.full((100,), 1 / 128), 0.25) == 68
    assert Budget(0, 100).spend(torch.full((100,), 7.0)) == 50


def test_many_long_scores_do_not_overflow() -> None:
    assert Budget(0, 1 << 20).spend(torch.full((1 << 20,), 3e38)) == 1 << 19


@pytest.mark.parametrize("unit", [1, 16, 20, 64])
def test_rounding_keeps_to_floor_and_ceiling(unit: int) -> None:
    """Rows of a pass are rounded down, to more than the floor allows at most."""
    forward = FakeForward(make_layout([(3, 20)]), unit=unit)
    for fixed in range(1, 60):
        left = Budget(fixed + 2, fixed + 2).without(2, lambda count: max(forward.affordable_rows(count + 9) - 9, 1))
        assert left.floor == left.ceiling == max(forward.affordable_rows(fixed + 9) - 9, 1)
    for limit in (0.0, 0.3, 0.6, 0.9):
        left = Budget(12, 50).without(2, lambda count: max(forward.affordable_rows(count + 9) - 9, 1))
        count = left.spend(torch.full((100,), 0.01), limit)
        wanted = min(max(round(100 * (1 - limit)), 10), 48)
        assert 10 <= count <= wanted
        assert count == 10 or (count + 9) % unit == 0 or count == wanted
    assert Budget(2, 9).without(5, int).floor == 1
