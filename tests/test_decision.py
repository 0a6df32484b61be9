"""What mode "auto" blends: what computes fewer tokens than plain prefill, choosing included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import BlendConfig
from cacheblend_rag.blending import blend_passes
from cacheblend_rag.decision import decide
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.matching import Segment
from cacheblend_rag.passes import Deviations, QuestionAttention
from cacheblend_rag.policies import policy_names

LAYERS = 6


class _Forward:
    """Computes nothing."""

    num_layers = LAYERS

    def __init__(self) -> None:
        self.exact_tokens = 0

    def extend_exact(self, rows: torch.Tensor) -> None:
        while self.exact_tokens in rows:
            self.exact_tokens += 1

    def now(self) -> float:
        return 0.0

    def affordable_rows(self, rows: int) -> int:
        return rows


def lay_out(runs: list[tuple[int, int]], question: int) -> PromptLayout:
    """Cold and warm tokens in turn, and a question."""
    segments, end = [], 0
    for number, (cold, warm) in enumerate(runs):
        segments.append(Segment(end + cold, warm, f"chunk{number}", 0))
        end = segments[-1].end
    return PromptLayout.build(end + question, segments)


def computed(layout: PromptLayout, config: BlendConfig) -> float:
    """Rows through all layers that a blend takes."""
    forward = _Forward()
    passes = blend_passes(forward, layout, config)  # type: ignore[arg-type]
    total, found = 0.0, None
    while True:
        try:
            wanted = next(passes) if found is None else passes.send(found)
        except StopIteration:
            return total
        total += len(wanted.rows) * ((wanted.layer + 1) / LAYERS if isinstance(wanted, Deviations) else 1)
        if isinstance(wanted, QuestionAttention):
            forward.extend_exact(wanted.rows)
        found = torch.linspace(0, 1, len(wanted.rows) if isinstance(wanted, Deviations) else layout.length)


@pytest.mark.parametrize("policy", policy_names())
@given(
    runs=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 900)), min_size=1, max_size=6),
    question=st.integers(1, 300),
    ratio=st.sampled_from([0.0, 0.15, 0.6, 1.0, "auto"]),
    checks=st.sampled_from([(0,), (1,), (1, 3), (5,)]),
    least=st.sampled_from([0, 1, 100, 512]),
    forced=st.sampled_from([0, 20, 300]),
)
def test_a_blend_spares_as_much_as_it_has_to(
    policy: str,
    runs: list[tuple[int, int]],
    question: int,
    ratio: Any,
    checks: tuple[int, ...],
    least: int,
    forced: int,
) -> None:
    layout = lay_out(runs, question)
    config = BlendConfig(ratio, policy=policy, check_layers=checks, min_reused_tokens=least, forced_tokens=forced)
    decision, reason = decide(layout, config, LAYERS)
    if decision == "blend":
        assert computed(layout, config) <= layout.length - least + 1e-6
    else:
        assert decision == "prefill"
        assert reason.endswith(f"min_reused_tokens is {least}")


def test_what_is_read_once_counts_once() -> None:
    """What stands before the first chunk is exact after the question's pass."""
    layout = lay_out([(120, 700)], 64)
    config = BlendConfig(min_reused_tokens=0)
    spared = layout.length - computed(layout, config)
    assert spared == 700 - 105 - 64
    assert decide(layout, BlendConfig(min_reused_tokens=int(spared)), LAYERS)[0] == "blend"
    assert decide(layout, BlendConfig(min_reused_tokens=int(spared) + 1), LAYERS)[0] == "prefill"


def test_a_blend_that_takes_longer_is_left() -> None:
    layout = lay_out([(0, 2000)], 64)
    assert decide(layout, BlendConfig(), LAYERS, 1636)[0] == "blend"
    decision, reason = decide(layout, BlendConfig(), LAYERS, 1637)
    assert (decision, reason[-40:]) == ("prefill", "a blend takes as long as prefill of 1637")


def test_half_warm_is_worth_it() -> None:
    """What is cold is computed once."""
    layout = lay_out([(512, 512)] * 4, 64)
    config = BlendConfig()
    assert decide(layout, config, LAYERS) == ("blend", f"reuses {2048 - 307} of {layout.length} tokens")
    assert computed(layout, config) < 0.8 * layout.length


def test_small_pieces_are_not() -> None:
    """Each of them is read twice, by the question's pass and by the last one."""
    layout = lay_out([(140, 150)] * 8, 64)
    assert computed(layout, BlendConfig()) > layout.length
    decision, reason = decide(layout, BlendConfig(), LAYERS)
    assert decision == "prefill"
    assert reason == (
        "blending would reuse 1020 tokens and compute 1044 more to choose the others, min_reused_tokens is 512"
    )
    assert decide(layout, BlendConfig(policy="chunk_heads"), LAYERS)[0] == "blend"


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_to_choose_costs_nothing(ratio: float) -> None:
    layout = lay_out([(140, 150)] * 8, 64)
    decision, reason = decide(layout, BlendConfig(ratio, min_reused_tokens=1200 if ratio == 0 else 0), LAYERS)
    assert (decision, reason) == ("blend", f"reuses {1200 if ratio == 0 else 0} of {layout.length} tokens")
