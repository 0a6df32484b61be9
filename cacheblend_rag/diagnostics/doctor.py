"""What ``cacheblend doctor`` concludes: from the figures of a sweep to checks, and from all checks to a verdict."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cacheblend_rag.diagnostics.checks import Check

if TYPE_CHECKING:
    from cacheblend_rag.diagnostics.sweep import SettingFigures, SweepResult

_SHORT = 1000  # tokens of a prompt: so few are prefilled about as soon
_MOST = 0.4  # of the time to the first token: a part that takes more is what to look at


def judge(found: SweepResult, *, most_kl: float) -> list[Check]:
    """Checks on prompts: chunks are found, the question is, answers are near enough, and sooner.

    Args:
        found: What was measured.
        most_kl: KL divergence from full prefill that is near enough, nats a token.
    """
    default = found.default
    stats = default.stats
    matched = sum(one.reused_tokens + one.recomputed_tokens + one.prefix_tokens for one in stats)
    total = sum(one.prompt_tokens for one in stats)
    checks = [
        Check(
            "known chunks are in the prompts",
            all(one.segments for one in stats),
            f"{matched / total:.0%} of {total:,} tokens, {sum(one.segments for one in stats)} runs of chunks",
            "" if all(one.segments for one in stats) else "prompts must hold chunks' text as it was ingested",
        )
    ]
    if not all(one.segments for one in stats):
        return checks
    policies = sorted({one.policy for one in stats} - {""})  # none chose where there was nothing to choose
    falls_back = default.blend["policy"] in ("query_aware", "hybrid") and "hkvd" in policies
    checks.append(
        Check(
            "the question is found",
            not falls_back,
            f"chosen by {', '.join(policies) or 'the ratio'}",
            "let the question follow the passages, with at least 8 tokens" if falls_back else "",
        )
    )
    cheapest = found.cheapest(most_kl)
    if cheapest is None:
        advice = "no setting tried is near enough: recompute_ratio=1 is full prefill; --max-kl says what is near"
    else:
        advice = f"the soonest that is near enough: {cheapest.name}"
    is_near = default.mean_kl <= most_kl
    agreement = statistics.fmean(default.agreement)
    kl = f"KL {'at least ' if found.kl_is_bound else ''}{default.mean_kl:.3f} nats a token"
    figure = f"{kl} (to be at most {most_kl:g}), same most likely token {agreement:.0%}"
    checks.append(Check("answers are near full prefill's", is_near, figure, "" if is_near else advice))
    figure = f"{default.share:.2f} of full prefill's time, prompts of {total // len(stats):,} tokens"
    is_sooner = default.share < 1
    checks.append(Check("the first token comes sooner", is_sooner, figure, "" if is_sooner else _why_late(found)))
    return checks


def _why_late(found: SweepResult) -> str:
    default = found.default
    parts = default.parts()
    if statistics.median(one.prompt_tokens for one in default.stats) < _SHORT:
        return f"prompts under {_SHORT:,} tokens gain little"
    if parts["load"] > _MOST:
        return f"loading takes {parts['load']:.0%}: keep chunks in memory (memory_bytes), in fewer bytes (codec fp8)"
    if parts["recompute"] > _MOST:
        return f"recomputing takes {parts['recompute']:.0%}: lower recompute_ratio"
    slowest = max(parts, key=lambda part: parts[part])
    return f'{slowest} takes {parts[slowest]:.0%}: this model is too quick for blending here, mode="auto" prefills'


def verdict(checks: Sequence[Check], cheapest: SettingFigures | None) -> str:
    """All of it in one line.

    Args:
        checks: All of them.
        cheapest: The setting to be used; None: nothing was measured, or none is near enough.
    """
    best = "" if cheapest is None else f"; soonest and near enough: {cheapest.name}"
    failed = [check for check in checks if not check.ok]
    if not failed:
        return f"all {len(checks)} checks are fine{best}"
    first = failed[0]
    return f"{len(failed)} of {len(checks)} checks failed: {first.name}: {first.advice or first.figure}{best}"
