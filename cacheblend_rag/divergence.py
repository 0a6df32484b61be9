"""How far next-token distributions are apart: of all tokens, or where only the most likely of each are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MOST_KL = 0.1
"""Nats a token, on average, that blended answers may be from full prefill's, for the guard and the doctor."""

TOPS = 20
"""Log-probabilities that are asked for with each token: as many as vLLM gives unless it is told otherwise."""

_ROUNDING = 1e-6  # of a probability, or a sum of probabilities in float32


def divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """KL divergence of the softmax of logits from what was expected, in nats, summed over tokens.

    Args:
        expected: Log-probabilities, float64 ``[tokens, vocabulary]``.
        logits: ``[tokens, vocabulary]``.
    """
    return float((expected.exp() * (expected - logits.double().log_softmax(-1))).sum())


def divergence_of_tops(expected: Mapping[int, float], found: Mapping[int, float]) -> float:
    """KL divergence of one next-token distribution from another, in nats: the least that it can be.

    Tokens that both know count one by one. Those that only ``expected`` knows are one outcome more, which the other
    distribution gives no more than its known tokens leave, and no more to each than to the least likely of those. All
    others are the last outcome.

    Args:
        expected: Token id to natural-log probability, of the most likely tokens; at least one.
        found: The same of the other distribution.
    """
    p, q = ({token: math.exp(value) for token, value in tops.items()} for tops in (expected, found))
    both, only = p.keys() & q.keys(), p.keys() - q.keys()
    p_only = sum(p[token] for token in only)
    p_rest = 1 - sum(p.values())
    q_others = 1 - sum(q[token] for token in both)
    most = min(len(only) * min(q.values()), 1 - sum(q.values()))
    q_only = min(q_others * p_only / max(p_only + p_rest, _ROUNDING), most)
    known = sum(p[token] * (expected[token] - found[token]) for token in both)
    total = known + _term(p_only, q_only) + _term(p_rest, q_others - q_only)
    return max(total, 0.0)  # rounding aside it is never less


def _term(p: float, q: float) -> float:
    return p * math.log(p / max(q, _ROUNDING)) if p > _ROUNDING else 0.0
