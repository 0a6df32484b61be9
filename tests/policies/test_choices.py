"""What each policy chooses, and what it asks the engine for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cacheblend_rag import BlendConfig, PolicyError, policies
from cacheblend_rag.blending import blend
from cacheblend_rag.budget import Budget
from cacheblend_rag.layout import PromptLayout, in_order
from cacheblend_rag.passes import SPAN, Deviations, Pass, QuestionAttention, Recompute, Selection
from cacheblend_rag.policies.query_aware import find_question, question_weights, read_question

from .conftest import FakeForward, Shape, make_layout, shapes

NAMES = policies.policy_names()


def choose(forward: FakeForward, layout: PromptLayout, **settings: object) -> list[int]:
    """The positions that are recomputed."""
    recomputed = blend(forward, layout, BlendConfig(**settings)).recomputed  # type: ignore[arg-type]
    return [int(position) for position in recomputed]


def kinds(forward: FakeForward) -> list[type[Pass]]:
    return [type(one) for one in forward.passes]


@pytest.mark.parametrize("policy", NAMES)
@given(
    shape=shapes,
    ratio=st.sampled_from([0.0, 0.01, 0.15, 0.5, 0.9, 1.0, "auto"]),
    forced=st.sampled_from([0, 1, 5, 100]),
    check_layers=st.sampled_from([(1,), (0, 2, 5)]),
    unit=st.sampled_from([1, 16, 64]),
)
def test_any_choice_is_one_that_may_be_made(
    policy: str, shape: Shape, ratio: Any, forced: int, check_layers: tuple[int, ...], unit: int
) -> None:
    layout = shape.layout()
    config = BlendConfig(recompute_ratio=ratio, policy=policy, forced_tokens=forced, check_layers=check_layers)
    forward = FakeForward(layout, unit=unit)
    result = blend(forward, layout, config)
    chosen, budget = result.recomputed, Budget.of(len(layout.matched), config)
    assert chosen.dtype == torch.int64
    assert bool((chosen[1:] > chosen[:-1]).all())
    assert bool(torch.isin(chosen, layout.matched).all())
    assert len(chosen) <= budget.ceiling
    if policy != "none" and (unit == 1 or budget.floor < budget.ceiling):
        assert len(chosen) >= budget.floor
    heads = {position for s in layout.segments for position in range(s.start, min(s.start + forced, s.end))}
    assert len(heads & set(chosen.tolist())) >= min(len(heads), budget.ceiling) * (forced > 0)
    last = forward.passes[-1]
    assert isinstance(last, Recompute)
    assert torch.equal(last.rows, torch.cat([chosen, layout.missed]).sort().values)
    again = blend(FakeForward(layout, unit=unit), layout, config)
    assert torch.equal(again.recomputed, chosen)


@pytest.mark.parametrize(("policy", "keys"), [("hkvd", False), ("hkvd_kv", True)])
def test_hkvd_takes_what_deviates_most(policy: str, keys: bool) -> None:
    layout = make_layout([(3, 20), (2, 20)])
    deviations = torch.zeros(layout.length)
    deviations[[5, 30, 31, 0, 50]] = torch.tensor([1.0, 3.0, 2.0, 9.0, 9.0])  # the last two are missed
    forward = FakeForward(layout, deviations=deviations)
    assert choose(forward, layout, policy=policy, recompute_ratio=0.08, check_layers=(2,)) == [5, 30, 31]
    measured, _ = forward.passes
    assert isinstance(measured, Deviations)
    assert (measured.layer, measured.keys) == (2, keys)
    assert measured.rows.tolist() == list(range(layout.question_start))  # what is missed runs along, but the question


@pytest.mark.parametrize("policy", ["hkvd", "hkvd_kv"])
def test_several_check_layers_leave_fewer_and_fewer(policy: str) -> None:
    layout = make_layout([(0, 60)], question=1)
    forward = FakeForward(layout)
    chosen = choose(forward, layout, policy=policy, recompute_ratio=0.2, check_layers=(0, 1, 4))
    measured = [one for one in forward.passes if isinstance(one, Deviations)]
    assert [(one.layer, len(one.rows)) for one in measured] == [(0, 60), (1, 20), (4, 16)]
    assert len(chosen) == 12
    for rows, fewer in zip(measured, [*measured[1:], Recompute(torch.tensor(chosen))], strict=True):
        assert set(fewer.rows.tolist()) < set(rows.rows.tolist())


def test_query_aware_takes_what_is_looked_at_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.policies.query_aware.READ_LEFT", 0.06)
    layout = make_layout([(3, 50), (2, 50)])
    reads = torch.full((layout.length,), 1e-5)
    reads[[4, 22, 40]] = torch.tensor([0.1, 0.2, 0.3])
    auto = {"recompute_ratio": "auto", "ratio_range": (0.01, 0.5)}
    assert choose(FakeForward(layout, given=reads), layout, **auto) == [4, 22, 40]
    reads[22] = 0.02
    for unit in (1.0, 100.0):  # norms have no scale
        assert choose(FakeForward(layout, given=reads * unit), layout, **auto) == [4, 40]
    reads[0] = 9.0  # the question reads next to nothing of the chunks
    assert choose(FakeForward(layout, given=reads), layout, **auto) == [40]  # the floor
    reads[0] = 0.0
    forward = FakeForward(layout, given=reads)
    assert choose(forward, layout, **auto, forced_tokens=2) == [3, 4, 40, 55, 56]
    reads[:] = 0.01
    assert len(choose(FakeForward(layout, given=reads), layout, **auto)) == 50  # the ceiling


def test_hkvd_takes_what_holds_most_of_the_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.budget.SHARE_LEFT", 0.5)
    layout = make_layout([(3, 50), (2, 50)])
    deviations = torch.full((layout.length,), 1e-6)
    deviations[[5, 30, 60]] = torch.tensor([400.0, 100.0, 25.0])
    for check_layers in ((1,), (0, 2, 4)):
        auto = {"policy": "hkvd", "recompute_ratio": "auto", "ratio_range": (0.01, 0.5), "check_layers": check_layers}
        forward = FakeForward(layout, deviations=deviations)
        assert choose(forward, layout, **auto) == [5]  # distances: 20 against 15 and a little
        deviations[60] = 225
        assert choose(FakeForward(layout, deviations=deviations), layout, **auto) == [5, 60]
        deviations[60] = 25


def test_hybrid_weighs_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.policies.hybrid.READ_LEFT", 0.06)
    layout = make_layout([(3, 50), (2, 50)])
    reads, deviations = torch.full((layout.length,), 1e-5), torch.ones(layout.length)
    reads[[4, 22, 40]] = torch.tensor([0.1, 0.2, 0.015])
    auto = {"policy": "hybrid", "recompute_ratio": "auto", "ratio_range": (0.01, 0.5)}
    for unit in (1.0, 100.0):  # distances have no scale
        forward = FakeForward(layout, given=reads, deviations=deviations * unit)
        assert choose(forward, layout, **auto) == [4, 22]
    deviations[40] = 4.0  # twice as wrong as others
    assert choose(FakeForward(layout, given=reads, deviations=deviations), layout, **auto) == [4, 22, 40]
    deviations[:] = 0.0
    assert len(choose(FakeForward(layout, given=reads, deviations=deviations), layout, **auto)) == 1


def test_query_aware_takes_what_the_question_looks_at() -> None:
    layout = make_layout([(3, 20), (2, 20)])
    reads = torch.zeros(layout.length)
    reads[[4, 22, 40, 0, 50]] = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.9])
    forward = FakeForward(layout, given=reads)
    assert choose(forward, layout, policy="query_aware", recompute_ratio=0.08) == [4, 22, 40]
    watched, _ = forward.passes
    assert isinstance(watched, QuestionAttention)
    assert watched.rows.tolist() == layout.missed.tolist()
    assert torch.equal(watched.weights, question_weights(12))
    assert watched.layers == range(3, 6)


@given(st.integers(1, 128))
def test_the_last_rows_of_a_question_count_as_much_as_all(count: int) -> None:
    weights = question_weights(count)
    assert len(weights) == count
    assert float(weights.sum()) == pytest.approx(1)
    assert weights.unique(return_counts=True)[1].tolist() == ([count - 8, 8] if count > 8 else [count])
    if count > 8:
        assert float(weights[-8:].sum()) == pytest.approx(0.5 + 4 / count)


@pytest.mark.parametrize("policy", ["query_aware", "hybrid"])
def test_the_question_is_watched_where_the_settings_say(policy: str) -> None:
    layout = make_layout([(3, 20), (2, 20)])
    for settings, layers in (({}, range(3, 6)), ({"question_layers": (1, 5)}, range(1, 5))):
        forward = FakeForward(layout)
        choose(forward, layout, policy=policy, **settings)
        assert [one.layers for one in forward.passes if isinstance(one, QuestionAttention)] == [layers]


def test_hybrid_takes_what_is_both_looked_at_and_wrong() -> None:
    layout = make_layout([(3, 20), (2, 20)])
    reads, deviations = torch.full((2, layout.length), 1e-3)
    reads[[5, 30, 40]] = torch.tensor([0.9, 0.4, 0.0])
    deviations[[5, 30, 40]] = torch.tensor([0.0, 4.0, 100.0])  # squares
    deviations[31], reads[31] = 9.0, 0.2  # 0.6 against 0.8
    forward = FakeForward(layout, given=reads, deviations=deviations)
    assert choose(forward, layout, policy="hybrid", recompute_ratio=0.025, check_layers=(1, 2)) == [30]
    assert kinds(forward) == [Deviations, QuestionAttention, Recompute]
    assert forward.passes[0].layer == 2  # type: ignore[union-attr]
    forward = FakeForward(layout, given=reads, deviations=deviations)
    assert choose(forward, layout, policy="hybrid", recompute_ratio=0.05) == [30, 31]


@pytest.mark.parametrize("policy", ["hkvd", "hkvd_kv", "hybrid", "query_aware"])
def test_only_auto_reads_back_what_was_measured(policy: str) -> None:
    """Tensors of the device "meta" have no values: who wants one, for which a GPU would stall, gets an exception."""
    layout = make_layout([(3, 40), (0, 40)])
    deviations, reads = torch.ones(2, layout.length, device="meta")
    forward = FakeForward(layout, deviations=deviations, given=reads, unit=16)
    settings = {"policy": policy, "forced_tokens": 2, "check_layers": (0, 2)}
    assert blend(forward, layout, BlendConfig(**settings, recompute_ratio=0.2)).recomputed.is_meta
    with pytest.raises(RuntimeError, match="meta tensors"):
        blend(forward, layout, BlendConfig(**settings, recompute_ratio="auto"))


@pytest.mark.parametrize("policy", ["query_aware", "hybrid"])
def test_without_a_question_values_decide(policy: str) -> None:
    layout = make_layout([(3, 40)], question=7)
    forward = FakeForward(layout)
    result = blend(forward, layout, BlendConfig(policy=policy))
    assert result.policy == "hkvd"
    assert kinds(forward) == [Deviations, Recompute]
    assert result.recomputed.tolist() == choose(FakeForward(layout), layout, policy="hkvd")


def test_chunk_heads_spread_the_budget_over_the_runs() -> None:
    layout = make_layout([(3, 20), (0, 2), (5, 20)])  # from 3, 23 and 30
    forward = FakeForward(layout)
    assert choose(forward, layout, policy="chunk_heads", recompute_ratio=0.17) == [3, 4, 5, 23, 24, 30, 31]
    assert kinds(forward) == [Recompute]
    assert choose(forward, layout, policy="chunk_heads", recompute_ratio=0.05) == [3, 23]
    assert choose(forward, layout, policy="chunk_heads", recompute_ratio=0.05, forced_tokens=1) == [3, 23]


def test_random_depends_on_the_matched_tokens_alone() -> None:
    runs = [(3, 50), (2, 50)]
    first = choose(FakeForward(make_layout(runs)), make_layout(runs), policy="random")
    longer = make_layout(runs, question=90)
    assert choose(FakeForward(longer), longer, policy="random") == first
    other = make_layout([(4, 50), (2, 50)])
    assert [n - 1 for n in choose(FakeForward(other), other, policy="random")] != first
    assert len(first) == 15


def test_random_is_fair() -> None:
    """Over many prompts every token is chosen about as often as the others."""
    counts = torch.zeros(100)
    for gap in range(400):
        layout = make_layout([(gap, 100)], question=1)
        counts[[n - gap for n in choose(FakeForward(layout), layout, policy="random", recompute_ratio=0.5)]] += 1
    assert int(counts.min()) > 150 and int(counts.max()) < 250  # five standard deviations


def test_none_chooses_what_is_forced() -> None:
    layout = make_layout([(3, 20), (2, 20)])
    forward = FakeForward(layout)
    assert choose(forward, layout, policy="none", recompute_ratio=0.9) == []
    assert choose(forward, layout, policy="none", recompute_ratio=0.9, forced_tokens=2) == [3, 4, 25, 26]
    assert choose(forward, layout, policy="none", recompute_ratio=1.0) == layout.matched.tolist()
    assert kinds(forward) == [Recompute] * 3


def test_forced_tokens_are_inside_the_budget() -> None:
    layout = make_layout([(3, 20), (2, 20), (0, 20)])  # from 3, 25 and 45
    settings = {"policy": "hkvd", "forced_tokens": 4}
    forward = FakeForward(layout)
    assert choose(forward, layout, **settings, recompute_ratio=0.1) == [3, 4, 25, 26, 45, 46]
    assert choose(forward, layout, **settings, recompute_ratio=0.07) == [3, 4, 25, 45]
    assert choose(forward, layout, **settings, recompute_ratio=0.0) == []
    assert kinds(forward) == [Recompute] * 3  # nobody was asked
    assert blend(forward, layout, BlendConfig(policy="hkvd", forced_tokens=1, recompute_ratio=0.05)).policy == ""

    forward = FakeForward(layout, deviations=torch.arange(layout.length).float())
    chosen = choose(forward, layout, policy="hkvd", forced_tokens=2, recompute_ratio=0.15)
    assert chosen == [3, 4, 25, 26, 45, 46, 62, 63, 64]


@pytest.mark.parametrize("policy", ["hkvd", "query_aware", "hybrid"])
def test_forced_tokens_are_fresh_when_others_are_measured(policy: str) -> None:
    layout = make_layout([(3, 20), (2, 20)])
    forward = FakeForward(layout)
    choose(forward, layout, policy=policy, forced_tokens=2, recompute_ratio=0.2)
    for one in forward.passes[:-1]:
        assert {3, 4, 25, 26} <= set(one.rows.tolist())


def test_rounding_rows_drops_no_forced_token() -> None:
    layout = make_layout([(3, 20), (2, 20)])  # 17 missed
    forward = FakeForward(layout, unit=20)
    chosen = choose(forward, layout, policy="chunk_heads", forced_tokens=3, recompute_ratio=0.2)
    assert chosen == [3, 4, 5, 6, 25, 26, 27]  # one less than was paid for


class _Gives:
    """A policy that returns what it was told to."""

    reads_question = False
    adapts = False

    def __init__(self, choice: Callable[[PromptLayout, int], object]) -> None:
        self._choice = choice

    def cost(self, *args: object) -> float:
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        yield from ()
        return "something else", self._choice(layout, budget.ceiling)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("choice", "what"),
    [
        (lambda layout, budget: layout.matched[: budget + 1], "with a budget of"),
        (lambda layout, budget: layout.matched[:2].flip(0), "ascending"),
        (lambda layout, budget: layout.matched[[0, 0]], "without repeats"),
        (lambda layout, budget: layout.missed[:1], "not offered"),
        (lambda layout, budget: torch.tensor([-1]), "not offered"),
        (lambda layout, budget: torch.tensor([layout.length]), "not offered"),
        (lambda layout, budget: layout.segments[0].start + torch.arange(1), "not offered"),  # it is forced
        (lambda layout, budget: layout.matched[:1].float(), "int64"),
        (lambda layout, budget: layout.matched[:1, None], "1-d"),
        (lambda layout, budget: layout.matched[:1].tolist(), "a tensor"),
    ],
)
def test_a_bad_choice_names_the_policy(
    choice: Callable[[PromptLayout, int], object], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(policies._POLICIES, "mine", _Gives(choice))  # type: ignore[arg-type]
    layout = make_layout([(3, 20), (2, 20)])
    forward = FakeForward(layout)
    with pytest.raises(PolicyError, match=f"policy 'mine' .*{what}"):
        choose(forward, layout, policy="mine", forced_tokens=1)
    assert not forward.passes  # nothing was computed from it
    monkeypatch.setitem(policies._POLICIES, "mine", _Gives(lambda layout, budget: layout.matched[:budget]))
    assert choose(forward, layout, policy="mine", forced_tokens=1) == [3, 4, 5, 6, 7, 25]


@given(shapes, st.lists(st.tuples(st.integers(0, 700), st.integers(1, 300)), max_size=4), st.booleans())
def test_the_question_leaves_out_what_is_cold(shape: Shape, cold: list[tuple[int, int]], is_forced: bool) -> None:
    """Whole spans, none of them first or in the question; whatever else is missed is read."""
    layout = make_layout([*shape.runs, *cold], question=shape.question, prefix=shape.prefix)
    question = find_question(layout)
    assume(question is not None)
    assert question is not None
    if is_forced:
        layout = layout.counting_as_missed(layout.matched[::2])
    wanted = read_question(layout, question, range(2, 4))
    assert torch.equal(in_order(wanted.rows, wanted.unread), layout.missed)
    assert torch.equal(wanted.rows[-len(question) :], question)
    spans = wanted.unread.view(-1, SPAN)
    assert torch.equal(spans, spans[:, :1] // SPAN * SPAN + torch.arange(SPAN))
    assert not (spans[:, 0] == 0).any()
    # As many as there are: forced tokens are read, whatever is missed around them.
    is_missed = torch.zeros(layout.length, dtype=torch.bool)
    is_missed[layout.missed] = True
    for segment in layout.segments:
        is_missed[segment.start : segment.end] = False
    starts = range(SPAN, int(question[0]) - SPAN + 1, SPAN)
    assert len(spans) == sum(bool(is_missed[start : start + SPAN].all()) for start in starts)
