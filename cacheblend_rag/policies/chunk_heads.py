"""Chunk heads: recompute the first tokens of each chunk.

EPIC (arXiv 2410.15332), LegoLink: prefilled alone, the first tokens of a chunk draw the attention that the first tokens
of any text draw. Amid a prompt they must not, so these are recomputed, and no others. The budget is spread over the
runs of chunks: the first token of each, then the second of each, and so on.

Cost: none; there is no pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cacheblend_rag.passes import Selection
from cacheblend_rag.policies.base import top_positions

if TYPE_CHECKING:
    from cacheblend_rag.budget import Budget
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout


class ChunkHeads:
    """Nearest to the head of its run first."""

    reads_question = False
    adapts = False

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        yield from ()
        return "chunk_heads", top_positions(layout.matched, -layout.places_in_segments(), budget.ceiling)
