"""Whether a prompt is blended, read behind its exact prefix only, or prefilled plainly."""

from __future__ import annotations

from cacheblend_rag.budget import Budget
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.stats import Decision


def decide(layout: PromptLayout, config: BlendConfig) -> tuple[Decision, str]:
    """What to do with a prompt, and why.

    Args:
        layout: What of the prompt is known.
        config: The request's settings; ``mode`` is not ``"off"``.
    """
    without_blend: Decision = "prefix" if layout.prefix else "prefill"
    if not layout.segments:
        return without_blend, "only an exact prefix is known" if layout.prefix else "no known chunk in the prompt"
    if config.mode == "blend":
        return "blend", "mode is blend"
    budget = Budget.of(len(layout.matched), config)
    reused = len(layout.matched) - budget.ceiling  # in any case
    at_least = "" if budget.floor == budget.ceiling else "at least "
    if reused < config.min_reused_tokens:
        return (
            without_blend,
            f"blending would reuse {at_least}{reused} tokens, min_reused_tokens is {config.min_reused_tokens}",
        )
    return "blend", f"reuses {at_least}{reused} of {layout.length} tokens"
