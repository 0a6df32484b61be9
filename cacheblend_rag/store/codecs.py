"""How the KV of chunks is kept.

raw    bit for bit, in the model's dtype
fp8    as 8-bit floats (e4m3): half the bytes of bfloat16 in memory, on disk and on the bus, with 3 bits of mantissa.
       Floats, not integers: a few channels of a model's keys are a hundred times larger than the rest, which would be
       lost between two integers. A scale for each layer and head keeps the largest of them in range.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from cacheblend_rag.errors import ConfigError

Codec = Literal["raw", "fp8"]

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


def check_codec(codec: object) -> None:
    """Refuse what is no codec.

    Raises:
        ConfigError: it is none.
    """
    if codec not in get_args(Codec):
        raise ConfigError(f"codec must be one of {', '.join(get_args(Codec))}, not {codec!r}")


def stored_dtype(codec: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that KV of a model's ``dtype`` is kept in."""
    return _FP8 if codec == "fp8" else dtype


def encode(kv: torch.Tensor, codec: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """KV as a codec keeps it.

    Args:
        kv: ``[layers, 2, tokens, kv_heads, head_dim]`` in the model's dtype.
        codec: Its name.

    Returns:
        The KV, and what it was divided by, float32 ``[layers, 2, kv_heads]``; None for nothing.
    """
    if codec == "raw":
        return kv, None
    scales = kv.abs().amax(dim=(2, 4)).float().div_(_LARGEST)
    scales[scales == 0] = 1.0
    encoded = torch.empty_like(kv, dtype=_FP8)
    for layer, scale in enumerate(scales):  # one at a time: the float32 copies stay small
        # Rounding must not carry the largest value out of range: e4m3 has no infinity, only NaN.
        encoded[layer] = (kv[layer].float() / scale[:, None, :, None]).clamp_(-_LARGEST, _LARGEST).to(_FP8)
    return encoded, scales


def decode(kv: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """KV as the model reads it; without scales it is returned as it is.

    Args:
        kv: ``[..., tokens, kv_heads, head_dim]``, as :func:`encode` made it.
        scales: float32 ``[..., kv_heads]``, on the same device.
        dtype: The model's.
    """
    return kv if scales is None else (kv.float() * scales[..., None, :, None]).to(dtype)
