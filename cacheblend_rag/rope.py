"""Shifts cached keys to new positions.

A cached key carries the rotation of the position it was computed at. Moving it means undoing that rotation and applying
the one of the new position (CacheBlend, appendix A). Both come from the model's *own* cos/sin tables rather than from a
formula for the difference: rounding of angles and tables, Llama-3's frequency scaling and YaRN's attention factor are
then exactly what the model would have applied at the new position.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class RotaryTable:
    """The rotation a model applies at some positions.

    Attributes:
        cos: float32 ``[tokens, rotary_dim / 2]``, any attention factor included.
        sin: The same for the sine.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def shift_table(old: RotaryTable, new: RotaryTable) -> RotaryTable:
    """The rotation that takes keys from their old positions to new ones.

    The inverse of a rotation scaled by ``a`` divides by ``a`` squared, so an attention factor is applied once in the
    result, as it was in the old keys.
    """
    norm = old.cos.square() + old.sin.square()
    cos = (new.cos * old.cos + new.sin * old.sin) / norm
    sin = (new.sin * old.cos - new.cos * old.sin) / norm
    return RotaryTable(cos, sin)


def rotate_keys(keys: torch.Tensor, table: RotaryTable, out: torch.Tensor) -> None:
    """Rotate keys in float32: bfloat16 angles or products cost accuracy that grows with the position.

    Args:
        keys: ``[..., tokens, kv_heads, head_dim]``. The first ``rotary_dim`` of the last dimension are rotated, as two
            halves (GPT-NeoX style: dimension ``i`` pairs with ``i + rotary_dim / 2``); the rest is copied.
        table: The rotation of each token.
        out: Like ``keys``, written; must not share memory with them.
    """
    half = table.cos.shape[-1]
    cos, sin = table.cos[:, None, :], table.sin[:, None, :]
    first, second = keys[..., :half].float(), keys[..., half : 2 * half].float()
    out[..., :half] = (first * cos).addcmul_(second, sin, value=-1)
    out[..., half : 2 * half] = (second * cos).addcmul_(first, sin)
    out[..., 2 * half :] = keys[..., 2 * half :]
