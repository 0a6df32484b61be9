"""Ideas for choosing tokens that are measured, not in the product: ``quality.py --policies two_looks,...``.

Each is a policy like the product's own, and may use any of its passes.
"""

from __future__ import annotations

import dataclasses

import torch

from cacheblend_rag.budget import Budget
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.layout import PromptLayout, in_order
from cacheblend_rag.passes import QuestionAttention, Selection
from cacheblend_rag.policies import SelectionPolicy, policy_names, register_policy, top_positions
from cacheblend_rag.policies.hkvd import HKVD, measure_deviations
from cacheblend_rag.policies.query_aware import QueryAware, find_question, question_weights, watched_layers

_TAIL = 8


def _alike(count: int) -> torch.Tensor:
    return torch.full((count,), 1 / count)


class _Idea:
    reads_question = True
    adapts = False

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """None is told: the benchmark blends whatever it costs."""
        return 0.0


class Layers(_Idea):
    """``query_aware`` with other layers than the last half.

    Args:
        first: Where they begin, as a share of all.
        last: Where they end.
    """

    def __init__(self, first: float, last: float) -> None:
        self._first, self._last = first, last

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        layers = (round(self._first * num_layers), round(self._last * num_layers))
        config = dataclasses.replace(config, question_layers=layers)
        return (yield from QueryAware().select(layout, budget, config, num_layers))


class ReadsCold(_Idea):
    """``query_aware`` whose question also reads the chunks that are not warm, which are then computed twice."""

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        question = find_question(layout)
        if question is None:
            return (yield from HKVD().select(layout, budget, config, num_layers))
        weights = question_weights(len(question))
        given = yield QuestionAttention(layout.missed, weights, watched_layers(config, num_layers))
        return "reads_cold", top_positions(layout.matched, given.cpu()[layout.matched], budget.ceiling)


class TwoLooks(_Idea):
    """The question looks, half of the budget is recomputed, and it looks again for the other half.

    Args:
        deviations: Multiply by the square root of the deviations, as ``hybrid`` does.
        follow: At the second look, what the recomputed tokens read counts as much as what the question does: what they
            are recomputed from should be right, too.
    """

    def __init__(self, *, deviations: bool = False, follow: bool = False) -> None:
        self._deviations = deviations
        self._follow = follow

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        question = find_question(layout)
        if question is None:
            return (yield from HKVD().select(layout, budget, config, num_layers))
        wrong = torch.ones(layout.length)
        if self._deviations:
            found = yield from measure_deviations(layout, layout.matched, config.check_layers[-1])
            wrong[layout.matched] = found.cpu().sqrt()
        layers, weights = watched_layers(config, num_layers), question_weights(len(question))
        given = yield QuestionAttention(layout.missed, weights, layers)
        scores = (given.cpu() * wrong)[layout.matched]
        first = top_positions(layout.matched, scores, budget.ceiling // 2)
        rows = in_order(first, layout.missed)
        given = (yield QuestionAttention(rows, weights, layers)).cpu()
        if self._follow:
            given = given + (yield QuestionAttention(rows, _alike(len(rows)), layers)).cpu()
        scores = given * wrong
        scores[first] = float("inf")
        return "two_looks", top_positions(layout.matched, scores[layout.matched], budget.ceiling)


class Rows(_Idea):
    """``query_aware`` whose question has all its rows count alike, or the last ones only.

    Args:
        last: How many; None: all.
    """

    def __init__(self, last: int | None) -> None:
        self._last = last

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        question = find_question(layout)
        if question is None:
            return (yield from HKVD().select(layout, budget, config, num_layers))
        weights = _alike(min(self._last or len(question), len(question)))
        given = yield QuestionAttention(layout.missed, weights, watched_layers(config, num_layers))
        return "rows", top_positions(layout.matched, given.cpu()[layout.matched], budget.ceiling)


class LateDeviations(_Idea):
    """``hybrid`` with deviations from further up, where they tell more and cost more.

    Args:
        share: How far up, as a share of the layers.
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        question = find_question(layout)
        if question is None:
            return (yield from HKVD().select(layout, budget, config, num_layers))
        # The question first: deviations leave fresh KV behind.
        weights = question_weights(len(question))
        given = yield QuestionAttention(layout.missed, weights, watched_layers(config, num_layers))
        found = yield from measure_deviations(layout, layout.matched, int(self._share * num_layers))
        scores = given.cpu()[layout.matched] * found.cpu().sqrt()
        return "late_deviations", top_positions(layout.matched, scores, budget.ceiling)


class Sensitive(_Idea):
    """Tokens whose KV was seen at ingestion to depend on what stands before the chunk.

    Args:
        attended: Multiply by what the question reads.

    Attributes:
        known: By key of a chunk, float32 ``[tokens]``: how far the values of each moved when another passage stood
            before the chunk.
    """

    known: dict[str, torch.Tensor]

    def __init__(self, *, attended: bool, known: dict[str, torch.Tensor]) -> None:
        self.reads_question = attended
        self.known = known

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        scores = torch.zeros(layout.length)
        for segment in layout.segments:
            moved = self.known[segment.key][segment.offset : segment.offset + segment.length]
            scores[segment.start : segment.end] = moved
        question = find_question(layout)
        if self.reads_question and question is not None:
            weights = question_weights(len(question))
            given = yield QuestionAttention(layout.missed, weights, watched_layers(config, num_layers))
            scores[: len(given)] *= given.cpu()
        return "sensitive", top_positions(layout.matched, scores[layout.matched], budget.ceiling)


SENSITIVITY: dict[str, torch.Tensor] = {}
"""What the two ``sensitive`` policies know."""

POLICIES: dict[str, SelectionPolicy] = {
    "all_layers": Layers(0, 1),
    "middle_half": Layers(1 / 4, 3 / 4),
    "third_quarter": Layers(1 / 2, 3 / 4),
    "last_quarter": Layers(3 / 4, 1),
    "reads_cold": ReadsCold(),
    "two_looks": TwoLooks(),
    "two_looks_hybrid": TwoLooks(deviations=True),
    "follow": TwoLooks(follow=True),
    "rows_alike": Rows(None),
    "tail": Rows(_TAIL),
    "hybrid_late": LateDeviations(0.25),
    "sensitive": Sensitive(attended=False, known=SENSITIVITY),
    "sensitive_attended": Sensitive(attended=True, known=SENSITIVITY),
}
"""By name."""


def register() -> None:
    """Make them known, once."""
    for name, policy in POLICIES.items():
        if name not in policy_names():
            register_policy(name, policy)
