"""How many matched tokens a blend recomputes.

A ratio pays for so many of them, whatever they are. With ``"auto"`` their scores decide, between a floor and a ceiling:
the fewest of the highest-scored tokens are taken that leave little enough to the others. Scores of all chunks are in
one row, so a chunk that matters gets more than one that does not, and a request that needs little gets little.

Source: this project.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from cacheblend_rag.config import AUTO, DEFAULT_RATIO
from cacheblend_rag.policies import get_policy

if TYPE_CHECKING:
    from cacheblend_rag.config import BlendConfig

SHARE_LEFT = 0.65
"""Most of the sum of all scores that the tokens may have that are not taken, where a policy names no other limit.

Of the scores it gives: with several check layers, those of the tokens that the earlier ones left.
"""

_STEPS = 2**40  # of the highest score: a million such scores still add up in 64 bits


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many tokens a policy chooses.

    Attributes:
        floor: Fewest tokens that it should choose.
        ceiling: Most tokens that it may choose. The same as ``floor`` unless the scores decide.
    """

    floor: int
    ceiling: int
    _affordable: Callable[[int], int] = int

    @classmethod
    def of(cls, matched: int, config: BlendConfig) -> Budget:
        """What a request's settings pay for: ``floor(ratio * matched)`` of each ratio of :func:`ratios`."""
        # Rounded first: 0.15 * 100 is 15.000000000000002 and 0.29 * 100 is 28.999999999999996.
        floor, ceiling = (math.floor(round(ratio * matched, 6)) for ratio in ratios(config))
        return cls(floor, ceiling)

    def without(self, spent: int, affordable: Callable[[int], int]) -> Budget:
        """What is left, at least one token, when some of it is spent: less than ``ceiling``.

        Args:
            spent: Tokens.
            affordable: The most tokens, up to a number, that are recomputed without waste; at least 1.
        """
        floor, ceiling = max(self.floor - spent, 1), affordable(self.ceiling - spent)
        if self.floor == self.ceiling:
            return Budget(ceiling, ceiling)
        return Budget(floor, max(floor, ceiling), affordable)

    def spend(self, scores: torch.Tensor, most_left: float | torch.Tensor | None = None) -> int:
        """How many of the highest scores to take.

        Where floor and ceiling are one, scores are not looked at. Otherwise, on a GPU, the host waits for them here.

        Args:
            scores: ``[n]``, none negative: of all tokens that may be chosen.
            most_left: What the scores that are not taken may sum to (a tensor of no dimensions, or a number); None:
                :data:`SHARE_LEFT` of the sum of all.
        """
        if self.floor == self.ceiling:
            return self.ceiling
        ascending = scores.double().sort().values
        highest = ascending[-1:].clamp(min=torch.finfo(torch.float64).tiny)
        # Sums of whole numbers are the same in whatever order a GPU adds: all ranks take equally many.
        sums = (ascending / highest * _STEPS).long().cumsum(0)
        limit = sums[-1:] * SHARE_LEFT if most_left is None else most_left / highest * _STEPS
        count = len(scores) - int((sums <= limit).sum())
        return max(self._affordable(min(count, self.ceiling)), self.floor)


def ratios(config: BlendConfig) -> tuple[float, float]:
    """Least and greatest share of the matched tokens that a request's settings pay for; one and the same if fixed."""
    if config.recompute_ratio != AUTO:
        return config.recompute_ratio, config.recompute_ratio
    floor, ceiling = config.ratio_range
    if get_policy(config.policy).adapts:
        return floor, ceiling
    ratio = min(max(DEFAULT_RATIO, floor), ceiling)
    return ratio, ratio
