"""Query-aware selection: recompute the tokens that the question reads.

The question's rows run through all layers over the reused KV. What they read, in the last half of the layers or in
those that ``BlendConfig.question_layers`` names, is where wrong KV would show in the answer. At equal budget this
closes more of the gap to full prefill than the deviation of early values does, and it needs no pass over all tokens.

A token's score is what it gives to their attention: the probability it gets, times the norm of its values. Much of the
attention goes to tokens whose values are next to nothing, and wrong or not add nothing. The last rows count most: the
answer begins there.

Source: this project. Norms of values beside attention are also what VATP keeps in a cache by (arXiv 2406.12335), and
the last rows of a prompt what SnapKV watches (arXiv 2404.14469).

Cost: one pass over the missed tokens (the template, the question), but for the most of cold chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cacheblend_rag.layout import upload
from cacheblend_rag.passes import SPAN, QuestionAttention, Selection
from cacheblend_rag.policies.base import top_positions
from cacheblend_rag.policies.hkvd import HKVD

if TYPE_CHECKING:
    from cacheblend_rag.budget import Budget
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.layout import PromptLayout

READ_LEFT = 0.08
"""With ``recompute_ratio="auto"``, the share of what the question reads that tokens may give that are not recomputed.

It bounds what their stale KV can change: an attention's output is a sum of what tokens give.
"""

# A tail this short is the end of a template, not a question: it stands before the passages then.
MIN_QUESTION_TOKENS = 8
# A longer tail holds cold chunks too: the question is its end.
MAX_QUESTION_TOKENS = 128
# Rows before the first token of the answer.
_LAST_TOKENS = 8


class QueryAware:
    """What the question reads most of first; ``hkvd`` where no question follows the passages."""

    reads_question = True
    adapts = True

    def cost(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> float:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        question = find_question(layout)
        if question is None:
            return HKVD().cost(layout, config, num_layers)
        wanted = read_question(layout, question, range(num_layers))
        # What stands before everything that is stale or not read is exact then: it is not computed again.
        first = min(int(wanted.unread[0]) if len(wanted.unread) else layout.length, layout.segments[0].start)
        return int(np.count_nonzero(wanted.rows.numpy() >= first))  # torch would wake its threads

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        """See :class:`~cacheblend_rag.policies.base.SelectionPolicy`."""
        question = find_question(layout)
        if question is None:
            return (yield from HKVD().select(layout, budget, config, num_layers))
        given = yield read_question(layout, question, watched_layers(config, num_layers))
        matched = upload(layout.matched, given.device)
        scores = given[matched]
        return "query_aware", top_positions(matched, scores, budget.spend(scores, READ_LEFT * given.sum()))


def find_question(layout: PromptLayout) -> torch.Tensor | None:
    """The positions of the question (int64, ascending), or None where none follows the passages."""
    question = torch.arange(layout.question_start, layout.length)[-MAX_QUESTION_TOKENS:]
    return question if len(question) >= MIN_QUESTION_TOKENS else None


def read_question(layout: PromptLayout, question: torch.Tensor, layers: range) -> QuestionAttention:
    """The pass that watches the question. It leaves out cold chunks, which would be computed twice.

    Whole spans that no known chunk covers are left out, but for the one that the prompt begins with: attention that has
    nowhere else to go goes there.
    """
    is_cold = np.zeros(-(-layout.length // SPAN) * SPAN, bool)
    is_cold[layout.missed.numpy()] = True
    for segment in layout.segments:  # its forced tokens are missed, too
        is_cold[segment.start : segment.end] = False
    is_cold[int(question[0]) :] = False
    spans = is_cold.reshape(-1, SPAN)
    spans &= spans.all(axis=1, keepdims=True)
    spans[0] = False
    unread = np.flatnonzero(spans)
    missed = layout.missed.numpy()
    rows = torch.from_numpy(missed[~is_cold[missed]])
    return QuestionAttention(rows, question_weights(len(question)), layers, torch.from_numpy(unread))


def question_weights(count: int) -> torch.Tensor:
    """What each row of a question counts (float32): half for all of them alike, half for the last few."""
    weights = torch.full((count,), 0.5 / count)
    weights[-_LAST_TOKENS:] += 0.5 / min(count, _LAST_TOKENS)
    return weights


def watched_layers(config: BlendConfig, num_layers: int) -> range:
    """The layers where the question's attention counts: the last half unless the config names them."""
    return range(*(config.question_layers or (num_layers // 2, num_layers)))
