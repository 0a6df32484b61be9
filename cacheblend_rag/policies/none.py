"""None: recompute nothing but what is forced.

A control: what reused KV gives by itself, or with the heads of chunks recomputed (``forced_tokens``). A ratio of 1
still recomputes all, as with every policy.

Cost: none; there is no pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cacheblend_rag.passes import Selection

if TYPE_CHECKING:
    from cacheblend_rag.budget import Budget
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout


class Nothing:
    """No token."""

    reads_question = False
    adapts = False

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        yield from ()
        return "none", layout.matched[:0]
