"""Compares blending with full prefill on some prompts, for several settings: how near, how soon."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cacheblend_rag.config import DEFAULT_RATIO, BlendConfig
from cacheblend_rag.diagnostics.comparing import ANSWER_TOKENS, Comparison
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.stats import PARTS, BlendStats

if TYPE_CHECKING:
    from cacheblend_rag.engines.base import Engine

_OFF = {"mode": "off"}


@dataclasses.dataclass(frozen=True)
class AskedPrompt:
    """A prompt whose chunks its engine knows.

    Attributes:
        text: All of it.
        engine: What is asked.
        comparison: How its answers are compared.
        passages: Those of its texts that are to be warmed before it is asked.
    """

    text: str
    engine: Engine
    comparison: Comparison
    passages: tuple[str, ...] = ()


@dataclasses.dataclass
class SettingFigures:
    """What one setting does, prompt by prompt.

    Attributes:
        blend: The setting, as the keyword ``blend`` of a call.
        kl: KL divergence of the next token from full prefill's, nats a token, over full prefill's own answer.
        agreement: Share of its tokens that are the most likely ones of both.
        ttft: Seconds to the first token.
        full_ttft: The same of full prefill.
        stats: How each prompt was read.
    """

    blend: dict[str, Any]
    kl: list[float] = dataclasses.field(default_factory=list)
    agreement: list[float] = dataclasses.field(default_factory=list)
    ttft: list[float] = dataclasses.field(default_factory=list)
    full_ttft: list[float] = dataclasses.field(default_factory=list)
    stats: list[BlendStats] = dataclasses.field(default_factory=list)

    @property
    def mean_kl(self) -> float:
        """Mean over the prompts: what a few bad ones do shows."""
        return statistics.fmean(self.kl)

    @property
    def share(self) -> float:
        """Time to the first token as a share of full prefill's, median over the prompts."""
        return statistics.median(mine / full for mine, full in zip(self.ttft, self.full_ttft, strict=True))

    @property
    def name(self) -> str:
        """For people."""
        checks = f", check layer {self.blend['check_layers'][0]}" if "check_layers" in self.blend else ""
        ratio = self.blend["recompute_ratio"]
        return f"{self.blend['policy']} {ratio if isinstance(ratio, str) else f'{ratio:.0%}'}{checks}"

    def parts(self) -> dict[str, float]:
        """Share of each part of the time to the first token, mean over the prompts."""
        return {
            part: statistics.fmean(getattr(one, part) / one.ttft for one in self.stats if one.ttft) for part in PARTS
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "name": self.name,
            "blend": self.blend,
            "kl_per_token": self.mean_kl if math.isfinite(self.mean_kl) else None,  # JSON has no NaN
            "top1_agreement": statistics.fmean(self.agreement),
            "ttft_share": self.share,
            "parts": self.parts(),
        }


@dataclasses.dataclass
class SweepResult:
    """What was found.

    Attributes:
        settings: The default first.
        answers: What full prefill and the default setting answer, prompt by prompt.
        kl_is_bound: Whether the KL divergence is the least that it can be, and not what it is.
    """

    settings: list[SettingFigures]
    answers: list[tuple[str, str]]
    kl_is_bound: bool = False

    @property
    def default(self) -> SettingFigures:
        """The figures of what is set."""
        return self.settings[0]

    def cheapest(self, most_kl: float) -> SettingFigures | None:
        """The setting whose first token comes soonest among those near enough; None too where nothing was blended."""
        blended = [setting for setting in self.settings if any(one.segments for one in setting.stats)]
        near = [setting for setting in blended if setting.mean_kl <= most_kl]
        return min(near, key=lambda setting: setting.share, default=None)


def settings_to_try(default: BlendConfig, num_layers: int) -> list[dict[str, Any]]:
    """What is set, other ratios and policies, and the check layers beside it."""
    ratio = DEFAULT_RATIO if isinstance(default.recompute_ratio, str) else default.recompute_ratio
    tried: list[dict[str, Any]] = [{"policy": default.policy, "recompute_ratio": default.recompute_ratio}]
    tried += [{"policy": default.policy, "recompute_ratio": other} for other in (0.05, 0.15, 0.25, 0.5)]
    tried += [{"policy": policy, "recompute_ratio": ratio} for policy in ("query_aware", "hkvd", "hybrid")]
    tried += [
        {"policy": "hkvd", "recompute_ratio": ratio, "check_layers": (layer,)} for layer in (0, 2) if layer < num_layers
    ]
    return [one for n, one in enumerate(tried) if one not in tried[:n]]


def sweep(
    prompts: Sequence[AskedPrompt],
    settings: Sequence[dict[str, Any]],
    progress: Callable[[int, int], None],
    *,
    warm: Callable[[Sequence[str]], object],
) -> SweepResult:
    """Read every prompt by full prefill and with every setting, in turn.

    Args:
        prompts: At least one; their engines are of one model.
        settings: At least one, the default first.
        progress: Called with (prompts done, prompts in all) after each.
        warm: Warms a prompt's passages right before it is asked: not all prompts' chunks may fit at a time.

    Raises:
        ChunkTooLongError: a passage does not fit the context.
        CacheBlendError: an engine does not tell how long a prompt took.
    """
    is_bound = any(prompt.comparison.is_bound for prompt in prompts)
    found = SweepResult([SettingFigures(dict(setting)) for setting in settings], [], is_bound)
    for number, prompt in enumerate(prompts):
        if prompt.passages:
            warm(prompt.passages)
        expected = prompt.comparison.expect(prompt.text)
        for setting in found.settings:
            blend = {"mode": "blend", **setting.blend}
            nearness = expected.compare(blend)
            setting.kl.append(nearness.kl)
            setting.agreement.append(nearness.agreement)
            # Plain prefill again and again, right before: a machine's speed changes.
            setting.full_ttft.append(_read(prompt, _OFF).ttft)
            setting.stats.append(_read(prompt, blend))
            setting.ttft.append(setting.stats[-1].ttft)
        default = {"mode": "blend", **found.default.blend}
        blended = prompt.engine.generate(prompt.text, max_tokens=ANSWER_TOKENS, blend=default)
        found.answers.append((expected.answer.text, blended.text))
        progress(number + 1, len(prompts))
    return found


def _read(prompt: AskedPrompt, blend: dict[str, Any]) -> BlendStats:
    """How a prompt is read that the engine has not read before, with the time that it takes."""
    stats = prompt.engine.generate(prompt.comparison.unread(prompt.text), max_tokens=1, blend=blend).stats
    if not stats.ttft:
        raise CacheBlendError(f"nothing can be timed: {stats.reason}")
    return stats
