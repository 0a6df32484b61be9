"""How far next-token distributions are apart: of all tokens, or where only the most likely of each are known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

_ROUNDING = 1e-6  # of a sum of probabilities in float32


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """KL divergence of the softmax of logits from what was expected, in nats, summed over tokens.

    Args:
        expected: Log-probabilities, float64 ``[tokens, vocabulary]``.
        logits: ``[tokens, vocabulary]``.
    """
    return float((expected.exp() * (expected - logits.double().log_softmax(-1))).sum())


def divergence_of_tops(expected: Mapping[int, float], found: Mapping[int, float]) -> float:
    """KL divergence of one next-token distribution from another, in nats; of all tokens it would be larger.

    Tokens that both know count one by one, all others together as one outcome more.

    Args:
        expected: Token id to natural-log probability, of the most likely tokens.
        found: The same of the other distribution.
    """
    both = expected.keys() & found.keys()
    total = sum(math.exp(expected[token]) * (expected[token] - found[token]) for token in both)
    rest, rest_found = (max(1 - sum(math.exp(tops[token]) for token in both), 0.0) for tops in (expected, found))
    if rest > _ROUNDING:
        total += rest * math.log(rest / max(rest_found, _ROUNDING))
    return max(total, 0.0)  # rounding aside it is never less
