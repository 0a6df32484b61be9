"""A forward pass that computes nothing, and prompts of any shape."""

from __future__ import annotations

import dataclasses
import time

import torch
from hypothesis import strategies as st

from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.matching import Segment
from cacheblend_rag.passes import Deviations, Pass, QuestionAttention, Recompute


class FakeForward:
    """What policies are told is made up: from the positions, and by default from a seed.

    Args:
        layout: The prompt.
        deviations: float32 ``[prompt tokens]``: what is measured, at every layer.
        given: float32 ``[prompt tokens]``: what the question reads.
        unit: Rows of a pass are rounded down to a multiple of this, as on a GPU.

    Attributes:
        passes: What was asked for.
    """

    num_layers = 6

    def __init__(
        self,
        layout: PromptLayout,
        *,
        deviations: torch.Tensor | None = None,
        given: torch.Tensor | None = None,
        unit: int = 1,
    ) -> None:
        generator = torch.Generator().manual_seed(layout.length)
        self.exact_tokens = layout.prefix
        self.passes: list[Pass] = []
        self._deviations = torch.rand(layout.length, generator=generator) if deviations is None else deviations
        self._given = torch.rand(layout.length, generator=generator) if given is None else given
        self._unit = unit

    def now(self) -> float:
        return time.perf_counter()

    def affordable_rows(self, rows: int) -> int:
        return rows // self._unit * self._unit or rows

    def deviations(self, rows: torch.Tensor, layer: int, keys: bool = False) -> torch.Tensor:
        self.passes.append(Deviations(rows, layer, keys))
        return self._deviations[rows]

    def question_attention(
        self, rows: torch.Tensor, weights: torch.Tensor, layers: range, unread: torch.Tensor
    ) -> torch.Tensor:
        self.passes.append(QuestionAttention(rows, weights, layers, unread))
        return self._given

    def recompute(self, rows: torch.Tensor) -> torch.Tensor:
        self.passes.append(Recompute(rows))
        return torch.zeros(3)


def make_layout(runs: list[tuple[int, int]], *, question: int = 12, prefix: int = 0) -> PromptLayout:
    """A prompt of missed tokens and runs of chunks, in turn (their lengths), and a question."""
    segments, end = [], prefix
    for number, (missed, length) in enumerate(runs):
        segments.append(Segment(end + missed, length, f"chunk{number}", 0))
        end = segments[-1].end
    return PromptLayout.build(end + question, segments, prefix=prefix)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Arguments of :func:`make_layout`: these, unlike a layout, are short to print."""

    runs: list[tuple[int, int]]
    question: int
    prefix: int

    def layout(self) -> PromptLayout:
        return make_layout(self.runs, question=self.question, prefix=self.prefix)


shapes = st.builds(
    Shape,
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 60)), min_size=1, max_size=6),
    st.integers(1, 200),
    st.integers(0, 40),
)
