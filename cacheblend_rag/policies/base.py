"""What a selection policy is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from cacheblend_rag.budget import Budget
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout
    from cacheblend_rag.passes import Selection


class SelectionPolicy(Protocol):
    """Chooses which matched tokens of a prompt are recomputed.

    The same prompt must always give the same choice, on all ranks of an engine too: a policy has no state, and draws
    nothing from a random generator that is not seeded by the prompt.

    Attributes:
        reads_question: Whether the choice depends on what stands after the last chunk. If not, prompts that differ only
            there may share blended KV.
        adapts: Whether it asks :meth:`~cacheblend_rag.budget.Budget.spend` how many tokens to choose. If not,
            ``recompute_ratio="auto"`` is a fixed ratio for it, the default one.
    """

    reads_question: bool
    adapts: bool

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """What :meth:`select` takes at most, in rows that run through all layers; a passing estimate will do.

        With ``mode="auto"``, a prompt is blended only if that spares it more.
        """

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """Choose.

        Args:
            layout: What is matched and what is missed. Forced tokens are among the missed.
            budget: How many tokens to choose: at least 1, at most as many as are matched.
            config: The request's settings.
            num_layers: Decoder layers of the model.

        Yields:
            Passes over the prompt, which cost time and leave fresh KV behind.

        Returns:
            The name of the policy that chose (one may fall back to another) and the chosen positions: int64, ascending,
            no repeats, a subset of ``layout.matched``, at most ``budget.ceiling``.
        """


def top_positions(positions: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` positions with the highest scores, ascending. Ties go to the earlier position.

    Args:
        positions: int64 ``[n]``, ascending.
        scores: ``[n]``.
        count: At most this many.
    """
    best = scores.argsort(descending=True, stable=True)[:count]
    return positions[best].sort().values
