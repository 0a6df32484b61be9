"""HKVD: recompute the tokens whose cached values deviate most from fresh ones at an early layer.

CacheBlend (arXiv 2405.16444), section 4.3: the tokens with high KV deviation at one layer are mostly those of the next,
so the first layers tell which tokens matter in all. Several check layers filter gradually: each leaves fewer tokens.

``hkvd`` compares values only, which are the same wherever a token stands; ``hkvd_kv`` compares keys too, shifted to the
same position. Keys are larger than values in most models, so there they decide.

Cost: the layers before the last check layer, and its QKV projections, over all tokens up to the last chunk.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch

from cacheblend_rag.layout import in_order, upload
from cacheblend_rag.passes import Deviations, Pass, Selection
from cacheblend_rag.policies.base import top_positions

if TYPE_CHECKING:
    from cacheblend_rag.budget import Budget
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout


class HKVD:
    """Highest KV deviation first.

    Args:
        keys: Whether keys count too.
    """

    reads_question = False
    adapts = True

    def __init__(self, *, keys: bool = False) -> None:
        self._keys = keys

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`. As if later checks were of as many tokens."""
        return len(_measured(layout, layout.matched)) * sum(layer + 1 for layer in config.check_layers) / num_layers

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        candidates = layout.matched
        checks = len(config.check_layers)
        for done, layer in enumerate(config.check_layers, start=1):
            deviations = yield from measure_deviations(layout, candidates, layer, keys=self._keys)
            # Gradual filtering: the share kept shrinks linearly to the budget at the last check layer.
            is_last = done == checks
            keep = budget.spend(deviations.sqrt()) if is_last else budget.ceiling * (2 * checks - done) // checks
            candidates = top_positions(upload(candidates, deviations.device), deviations, keep)
        return "hkvd_kv" if self._keys else "hkvd", candidates


def measure_deviations(
    layout: PromptLayout, candidates: torch.Tensor, layer: int, *, keys: bool = False
) -> Generator[Pass, torch.Tensor, torch.Tensor]:
    """How far some matched positions deviate at a layer, float32 ``[candidates]``: one pass.

    What is missed before the last chunk runs along: the candidates are to see it as it is.
    """
    rows = _measured(layout, candidates)
    deviations = yield Deviations(rows, layer, keys)
    rows, candidates = upload(rows, deviations.device), upload(candidates, deviations.device)
    return deviations[torch.searchsorted(rows, candidates)]


def _measured(layout: PromptLayout, candidates: torch.Tensor) -> torch.Tensor:
    return in_order(candidates, layout.missed[layout.missed < layout.question_start])
