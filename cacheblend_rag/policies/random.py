"""Random: recompute any tokens. A control: a policy is worth its cost if it does better than this one.

The choice is drawn from the positions of the matched tokens, so that the same prompt gives the same choice, on every
engine and every rank.

Cost: none; there is no pass.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from cacheblend_rag.passes import Selection
from cacheblend_rag.policies.base import top_positions

if TYPE_CHECKING:
    from cacheblend_rag.budget import Budget
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout


class Random:
    """Any tokens, each as likely as the others."""

    reads_question = False
    adapts = False

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        yield from ()
        generator = torch.Generator().manual_seed(zlib.crc32(layout.matched.numpy().tobytes()))
        order = torch.rand(len(layout.matched), generator=generator)
        return "random", top_positions(layout.matched, order, budget.ceiling)
