"""Hybrid: recompute the tokens that the question reads and whose cached values are wrong.

A token's score is what it gives to the question's attention, as in ``query_aware``, times the distance between its
fresh and its cached values, the square root of what ``hkvd`` sorts by. That is about what its values add to the error
of the question's attention: neither a wrong token that nobody reads, nor a right one.

Source: this project, from ``query_aware`` and CacheBlend (arXiv 2405.16444), section 4.3.

Cost: the passes of both. With one check layer, the first: the layers before it, and its QKV projections, over all
tokens up to the last chunk, and all layers over the missed tokens, but for the most of cold chunks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cacheblend_rag.layout import upload
from cacheblend_rag.passes import Selection
from cacheblend_rag.policies.base import top_positions
from cacheblend_rag.policies.hkvd import HKVD, measure_deviations
from cacheblend_rag.policies.query_aware import READ_LEFT, QueryAware, find_question, read_question, watched_layers

if TYPE_CHECKING:
    from cacheblend_rag.budget import Budget
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout


class Hybrid:
    """Highest product of what is read and deviation first; ``hkvd`` where no question follows the passages."""

    reads_question = True
    adapts = True

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        if find_question(layout) is None:
            return HKVD().cost(layout, config, num_layers)
        one_check = dataclasses.replace(config, check_layers=config.check_layers[-1:])
        return HKVD().cost(layout, one_check, num_layers) + QueryAware().cost(layout, config, num_layers)

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        question = find_question(layout)
        if question is None:
            return (yield from HKVD().select(layout, budget, config, num_layers))
        # Deviations first: they leave fresh KV in the first layers, over which the question then reads the rest.
        deviations = yield from measure_deviations(layout, layout.matched, config.check_layers[-1])
        given = yield read_question(layout, question, watched_layers(config, num_layers))
        matched = upload(layout.matched, given.device)
        distances = deviations.sqrt()
        scores = given[matched] * distances
        # With distances in units of their mean, scores are shares of what is read as in query_aware.
        count = budget.spend(scores, READ_LEFT * given.sum() * distances.mean())
        return "hybrid", top_positions(matched, scores, count)
