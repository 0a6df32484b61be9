"""Whether a prompt is blended, read behind its exact prefix only, or prefilled plainly."""

from __future__ import annotations

import math

from cacheblend_rag.blending import forced_positions
from cacheblend_rag.budget import Budget
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.policies import get_policy
from cacheblend_rag.stats import Decision


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
    reused = len(layout.matched) - budget.ceiling  # in any case
    at_least = "" if budget.floor == budget.ceiling else "at least "
    cost = _cost_of_choosing(layout, config, budget, num_layers)
    if reused - cost < max(config.min_reused_tokens, overhead):
        least = f"min_reused_tokens is {config.min_reused_tokens}"
        if overhead > config.min_reused_tokens:
            least = f"a blend takes as long as prefill of {overhead}"
        return (
            without_blend,
            f"blending would reuse {at_least}{reused} tokens and compute {cost} more to choose the others, {least}",
        )
    return "blend", f"reuses {at_least}{reused} of {layout.length} tokens"


def _cost_of_choosing(layout: PromptLayout, config: BlendConfig, budget: Budget, num_layers: int) -> int:
    forced = forced_positions(layout, config, budget.ceiling)
    if len(forced) == budget.ceiling or budget.floor == len(layout.matched):
        return 0  # nothing is left to choose
    layout = layout.counting_as_missed(forced) if len(forced) else layout
    return math.ceil(get_policy(config.policy).cost(layout, config, num_layers))
