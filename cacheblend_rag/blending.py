"""The blend: choose which matched tokens to recompute, then prefill those and everything missed in one pass.

    reuse   cached KV is in place, shifted (the engine loaded it)
    select  a policy names the matched tokens whose KV would change most (CacheBlend, section 4.3)
    fuse    one forward pass of the model over chosen and missed tokens; each sees every key up to its own position,
            cached or fresh, and writes its own KV for the tokens after it

Ratio 1 chooses every matched token: the pass is then plain prefill. Ratio 0 is full reuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any, Protocol

import torch

from cacheblend_rag.budget import Budget
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import PolicyError
from cacheblend_rag.layout import PromptLayout, in_order, upload
from cacheblend_rag.passes import Deviations, Pass, QuestionAttention, Recompute, Selection
from cacheblend_rag.policies import get_policy, is_built_in, top_positions
from cacheblend_rag.recording import Recorder


class Moment(Protocol):
    """A point in time, such as ``time.perf_counter()``; on a GPU one that may not have come yet."""

    def __sub__(self, earlier: Any, /) -> float:
        """Seconds since an earlier moment; waits until this one has come."""


class BlendForward(Protocol):
    """One prompt inside an engine: its KV, partly loaded from chunks, and the model that can run over any of its rows.

    On a GPU nothing here is read back to the host, which prepares the next pass while the GPU is busy with the last;
    only ``recompute_ratio="auto"`` reads back how many tokens it takes.

    Attributes:
        num_layers: Decoder layers.
        exact_tokens: Leading positions whose KV is exact in all layers.
    """

    num_layers: int
    exact_tokens: int

    def now(self) -> Moment:
        """This moment in the engine's work, which may lag behind the caller's."""

    def affordable_rows(self, rows: int) -> int:
        """The most rows, up to ``rows``, that are recomputed without waste; ``rows`` if it doesn't matter."""

    def deviations(self, rows: torch.Tensor, layer: int, keys: bool = False) -> torch.Tensor:
        """See :class:`~cacheblend_rag.passes.Deviations`."""

    def question_attention(
        self, rows: torch.Tensor, weights: torch.Tensor, layers: range, unread: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`~cacheblend_rag.passes.QuestionAttention`."""

    def recompute(self, rows: torch.Tensor) -> torch.Tensor:
        """See :class:`~cacheblend_rag.passes.Recompute`."""


@dataclasses.dataclass(frozen=True)
class BlendResult:
    """What a blend did.

    Attributes:
        logits: float32 ``[vocabulary]``: logits of the first token; empty if the engine computes the last row itself.
        recomputed: int64: the matched positions that were recomputed.
        policy: Who chose them; empty where there was nothing to choose (at ratio 0 and 1, or if all that is paid for is
            forced).
        started: When choosing began,
        selected: when it ended and the fusing pass began,
        finished: and when that ended.
    """

    logits: torch.Tensor
    recomputed: torch.Tensor
    policy: str
    started: Moment
    selected: Moment
    finished: Moment

    @property
    def select_seconds(self) -> float:
        """Time to choose. On a GPU this waits for the blend to end."""
        return self.selected - self.started

    @property
    def recompute_seconds(self) -> float:
        """Time of the fusing pass; likewise."""
        return self.finished - self.selected


def blend(
    forward: BlendForward, layout: PromptLayout, config: BlendConfig, recorder: Recorder | None = None
) -> BlendResult:
    """Blend one prompt; see :func:`blend_passes`. What it finds is recorded, if somebody does."""
    passes = blend_passes(forward, layout, config)
    if recorder is not None:
        passes = recorder.listen(passes)
    try:
        wanted = next(passes)
        while True:
            wanted = passes.send(run_pass(forward, wanted))
    except StopIteration as end:
        result: BlendResult = end.value
        return result


def run_pass(forward: BlendForward, wanted: Pass) -> torch.Tensor:
    """Run one pass over one prompt."""
    match wanted:
        case Deviations():
            return forward.deviations(wanted.rows, wanted.layer, wanted.keys)
        case QuestionAttention():
            return forward.question_attention(wanted.rows, wanted.weights, wanted.layers, wanted.unread)
        case Recompute():
            return forward.recompute(wanted.rows)


def blend_passes(
    forward: BlendForward, layout: PromptLayout, config: BlendConfig, chosen: torch.Tensor | None = None
) -> Generator[Pass, torch.Tensor, BlendResult]:
    """Blend a prompt whose cached KV is loaded; afterwards its KV is complete and its first token can be chosen.

    Without segments this is plain prefill of everything after the prefix.

    Args:
        forward: The prompt inside the engine.
        layout: Where the KV of its positions comes from.
        config: The request's settings.
        chosen: Matched positions (int64, ascending) to recompute, where that has been decided before. None: the policy
            chooses.

    Yields:
        Passes to be run in turn, and is sent what they find.

    Raises:
        PolicyError: the policy returned positions that it may not return.
    """
    started = forward.now()
    budget = Budget.of(len(layout.matched), config)
    policy_name = ""
    if chosen is not None:
        pass
    elif budget.floor == len(layout.matched):
        chosen = layout.matched
    elif budget.ceiling == 0:
        chosen = layout.matched[:0]
    else:
        policy_name, chosen = yield from _choose(forward, layout, config, budget)
    selected = forward.now()
    # What stands before the first segment may have become exact while selecting.
    missed = layout.missed[layout.missed >= forward.exact_tokens]
    logits = yield Recompute(in_order(chosen, missed))
    return BlendResult(logits, chosen, policy_name, started, selected, forward.now())


def forced_positions(layout: PromptLayout, config: BlendConfig, budget: int) -> torch.Tensor:
    """What is recomputed whatever the policy chooses (int64, ascending): the first tokens of each segment.

    What stands before a chunk is not what it was prefilled behind, which the first tokens behind such a seam feel most.
    Those before a seam need nothing: they don't see what follows.

    Args:
        layout: The prompt.
        config: The request's settings.
        budget: Most of them; those nearest to the heads of their segments are taken.
    """
    places = layout.places_in_segments()
    heads = places < config.forced_tokens
    return top_positions(layout.matched[heads], -places[heads], budget)


def _choose(forward: BlendForward, layout: PromptLayout, config: BlendConfig, budget: Budget) -> Selection:
    """The forced positions, and what the policy chooses with the rest of the budget."""
    forced = layout.matched[:0]
    if config.forced_tokens:
        forced = forced_positions(layout, config, budget.ceiling)
        layout = layout.counting_as_missed(forced)
    if len(forced) == budget.ceiling:
        return "", forced
    needed = int((layout.missed >= forward.exact_tokens).sum())

    def affordable(count: int) -> int:
        return max(forward.affordable_rows(count + needed) - needed, 1)

    budget = budget.without(len(forced), affordable)
    name, chosen = yield from get_policy(config.policy).select(layout, budget, config, forward.num_layers)
    _check_choice(config.policy, chosen, layout, budget.ceiling)
    if len(forced):
        chosen = in_order(chosen, forced)
    return name, chosen


def _check_choice(policy: str, chosen: torch.Tensor, layout: PromptLayout, budget: int) -> None:
    """A bad choice must not become a wrong answer."""
    if not isinstance(chosen, torch.Tensor):
        raise PolicyError(f"policy {policy!r} must return a tensor, not {type(chosen).__name__}")
    if chosen.dtype != torch.int64 or chosen.dim() != 1:
        raise PolicyError(
            f"policy {policy!r} must return a 1-d int64 tensor, not {chosen.dtype} of shape {tuple(chosen.shape)}"
        )
    if len(chosen) > budget:
        raise PolicyError(f"policy {policy!r} chose {len(chosen)} tokens with a budget of {budget}")
    if chosen.device.type != "cpu" and is_built_in(policy):
        return  # to read them back would stall the GPU; ``top_positions`` keeps to the rest
    rules = [chosen[1:] > chosen[:-1], torch.isin(chosen, upload(layout.matched, chosen.device))]
    is_ascending, is_offered = torch.stack([rule.all() for rule in rules]).tolist()  # read back once
    if not is_ascending:
        raise PolicyError(f"policy {policy!r} must return ascending positions without repeats")
    if not is_offered:
        raise PolicyError(f"policy {policy!r} chose a position that it was not offered")
