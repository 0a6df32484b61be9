"""The passes over a prompt that a blend asks its engine for.

A blend is a generator: it yields passes and is sent what they found. Whoever drives it may run one prompt, or the
passes of several prompts as one.

Rows are int64 positions, ascending, on the CPU or on the engine's device, and so is what is sent back. A row sees keys
0 .. its own position, cached or fresh, unless a pass says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import TypeAlias

import torch

SPAN = 128
"""What a pass may leave out at once, in positions from 0 on: a whole number of blocks of most paged caches."""


@dataclasses.dataclass(frozen=True)
class Deviations:
    """Run rows up to the values of a layer, keeping their fresh KV there and in the layers before.

    Sent back is float32 ``[rows]``: the squared L2 distance between fresh and cached values of that layer, over all
    heads. If keys count, theirs is added: both stand at the row's position, the cached one by having been shifted.

    Attributes:
        rows: What is run.
        layer: The last layer, 0-based.
        keys: Whether keys count too.
    """

    rows: torch.Tensor
    layer: int
    keys: bool = False


@dataclasses.dataclass(frozen=True)
class QuestionAttention:
    """Run rows through all layers and watch what the question reads.

    Sent back is float32 ``[prompt tokens]``: what each token gives to the question's attention, which is the
    probability it gets times the L2 norm of the values it has there; mean over layers and heads, weighted sum over the
    question's rows.

    Attributes:
        rows: What is run; the last of them are the question.
        weights: float32 ``[question]`` on the CPU: what each row of the question counts.
        layers: Layers that count, at least one.
        unread: Positions, int64 on the CPU, ascending, that no row sees: they have no KV yet. Whole spans of
            :data:`SPAN` positions. An engine whose blocks are larger runs them, too.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    layers: range
    unread: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclasses.dataclass(frozen=True)
class Recompute:
    """Run rows through all layers, the prompt's last row among them, and keep their KV.

    Sent back is float32 ``[vocabulary]``: the logits after the last row; empty if the engine computes it itself.

    Attributes:
        rows: What is run.
    """

    rows: torch.Tensor


Pass: TypeAlias = Deviations | QuestionAttention | Recompute

Selection: TypeAlias = Generator[Pass, torch.Tensor, tuple[str, torch.Tensor]]
"""Passes that end in a choice of positions, and the name of the policy that chose."""
