"""HKVD: recompute the tokens whose cached values deviate most from fresh ones at an early layer.

CacheBlend (arXiv 2405.16444), section 4.3: the tokens with high KV deviation at one layer are mostly those of the next,
so the first layers tell which tokens matter in all. Several check layers filter gradually: each leaves fewer tokens.

Cost: the layers before the last check layer, and its QKV projections, over all tokens up to the last chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cacheblend_rag.layout import upload
from cacheblend_rag.passes import Deviations, Selection
from cacheblend_rag.policies.base import top_positions

if TYPE_CHECKING:
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout


class HKVD:
    """Highest KV deviation first."""

    reads_question = False

    def select(self, layout: PromptLayout, budget: int, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        missed = layout.missed[layout.missed < layout.question_start]
        candidates = layout.matched
        checks = len(config.check_layers)
        for done, layer in enumerate(config.check_layers, start=1):
            rows = torch.cat([candidates, upload(missed, candidates.device)]).sort().values
            among_rows = torch.searchsorted(rows, candidates)
            deviations = yield Deviations(rows, layer)
            # Gradual filtering: the share kept shrinks linearly to the budget at the last check layer.
            keep = budget * (2 * checks - done) // checks
            candidates = top_positions(
                upload(candidates, deviations.device), deviations[upload(among_rows, deviations.device)], keep
            )
        return "hkvd", candidates
