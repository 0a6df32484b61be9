"""Whether a prompt is blended, read behind its exact prefix only, or prefilled plainly."""

from __future__ import annotations

import dataclasses
import math

from cacheblend_rag.blending import forced_positions
from cacheblend_rag.budget import Budget
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.policies import get_policy
from cacheblend_rag.stats import Decision


@dataclasses.dataclass(frozen=True)
class BlendCosts:
    """What a blend takes beside the tokens that it computes, in tokens that could be prefilled meanwhile.

    Attributes:
        fixed: Whatever is blended.
        choosing: Besides, where tokens are to be chosen.
        run: For each run of a chunk.
        token: For each token of them.
    """

    fixed: float = 0.0
    choosing: float = 0.0
    run: float = 0.0
    token: float = 0.0

    def __str__(self) -> str:
        """For people."""
        if self == BlendCosts():
            return "a blend takes next to nothing"
        return (
            f"a blend takes as long as prefill of {self.fixed:.0f} tokens, {self.choosing:.0f} more to choose some, "
            f"{self.run:.0f} for each run of a chunk and {self.token:.2f} for each token of it"
        )

    def overhead(self, layout: PromptLayout, config: BlendConfig, num_layers: int) -> int:
        """Of a prompt; see :func:`decide`."""
        fixed = self.fixed
        if self.choosing and _reused_and_cost(layout, config, Budget.of(len(layout.matched), config), num_layers)[1]:
            fixed += self.choosing
        tokens = sum(segment.length for segment in layout.segments)
        return math.ceil(fixed + self.run * len(layout.segments) + self.token * tokens)


def decide(layout: PromptLayout, config: BlendConfig, num_layers: int, overhead: int = 0) -> tuple[Decision, str]:
    """What to do with a prompt, and why.

    Args:
        layout: What of the prompt is known.
        config: The request's settings; ``mode`` is not ``"off"``.
        num_layers: Decoder layers of the model.
        overhead: Tokens that could be prefilled in the time that a blend takes beside those it computes.
    """
    without_blend: Decision = "prefix" if layout.prefix else "prefill"
    if not layout.segments:
        return without_blend, "only an exact prefix is known" if layout.prefix else "no known chunk in the prompt"
    if config.mode == "blend":
        return "blend", "mode is blend"
    budget = Budget.of(len(layout.matched), config)
    reused, cost = _reused_and_cost(layout, config, budget, num_layers)
    at_least = "" if budget.floor == budget.ceiling else "at least "
    if reused - cost < max(config.min_reused_tokens, overhead):
        least = f"min_reused_tokens is {config.min_reused_tokens}"
        if overhead > config.min_reused_tokens:
            least = f"a blend takes as long as prefill of {overhead}"
        return (
            without_blend,
            f"blending would reuse {at_least}{reused} tokens and compute {cost} more to choose the others, {least}",
        )
    return "blend", f"reuses {at_least}{reused} of {layout.length} tokens"


def spared_tokens(layout: PromptLayout, config: BlendConfig, num_layers: int) -> int:
    """Tokens that a blend computes less than plain prefill does, choosing included, at least; see :func:`decide`."""
    reused, cost = _reused_and_cost(layout, config, Budget.of(len(layout.matched), config), num_layers)
    return reused - cost


def _reused_and_cost(layout: PromptLayout, config: BlendConfig, budget: Budget, num_layers: int) -> tuple[int, int]:
    """Tokens that are reused in any case, and tokens that choosing the others takes."""
    return len(layout.matched) - budget.ceiling, _cost_of_choosing(layout, config, budget, num_layers)


def _cost_of_choosing(layout: PromptLayout, config: BlendConfig, budget: Budget, num_layers: int) -> int:
    forced = forced_positions(layout, config, budget.ceiling) if config.forced_tokens else layout.matched[:0]
    if len(forced) == budget.ceiling or budget.floor == len(layout.matched):
        return 0  # nothing is left to choose
    layout = layout.counting_as_missed(forced) if len(forced) else layout
    return math.ceil(get_policy(config.policy).cost(layout, config, num_layers))
