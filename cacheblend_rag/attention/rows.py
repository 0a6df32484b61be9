"""Exact-position attention in plain torch: the reference for every faster kernel.

When only some tokens of a prompt are recomputed, their queries stand at scattered positions while keys stand at all of
them. A causal mask aligned to a corner of the [rows, keys] rectangle would let a query see later keys, or hide earlier
ones; what is exact is a mask by position. It is built once a forward pass, in blocks of rows, and used by all layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F

# Small enough that a block's keys end soon after its rows do (nothing is computed for keys that no row sees),
# large enough for efficient matrix products.
BLOCK_ROWS = 192
# On a GPU, launching a block takes longer than the keys that no row sees.
_GPU_BLOCK_ROWS = 2048


@dataclasses.dataclass(frozen=True)
class _Block:
    first: int
    last: int
    keys: int
    mask: torch.Tensor | None  # additive, [rows, keys]; None: every row sees every key


class RowAttention:
    """Attention of some rows of one sequence over the keys of all of it.

    Args:
        positions: int64 ``[rows]``, ascending.
        dtype: Dtype of queries, keys and values.
        window: Sliding window in tokens: a row at p sees keys p - window + 1 .. p only. None: no window.
    """

    def __init__(self, positions: torch.Tensor, dtype: torch.dtype, window: int | None = None) -> None:
        self.positions = positions
        self.last_position = int(positions[-1])
        rows = len(positions)
        if window is not None and window > self.last_position:
            window = None
        self._whole = rows == self.last_position + 1 and window is None
        self._blocks: list[_Block] = []
        most = BLOCK_ROWS if positions.device.type == "cpu" else _GPU_BLOCK_ROWS
        for first in range(0, 0 if self._whole else rows, most):
            last = min(first + most, rows)
            keys = int(positions[last - 1]) + 1
            mask = None
            if last - first > 1 or window is not None:
                key_positions = torch.arange(keys, device=positions.device)
                hidden = key_positions > positions[first:last, None]
                if window is not None:
                    hidden |= key_positions <= positions[first:last, None] - window
                mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
                mask.masked_fill_(hidden, float("-inf"))
            self._blocks.append(_Block(first, last, keys, mask))

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend.

        Args:
            query: ``[1, heads, rows, head_dim]``.
            key: ``[1, kv_heads, tokens, head_dim]`` for positions 0 .. tokens - 1.
            value: Like ``key``.
            scale: Factor of the logits.

        Returns:
            ``[1, heads, rows, head_dim]``.
        """
        grouped = query.shape[1] != key.shape[1]
        if self._whole:
            tokens = self.last_position + 1
            key, value = key[:, :, :tokens], value[:, :, :tokens]
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
        if grouped and key.device.type != "cpu" and any(block.mask is not None for block in self._blocks):
            # Of torch's GPU kernels, those that take a mask know no groups: it would make whole matrices of logits.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            grouped = False
        out = torch.empty_like(query)
        for block in self._blocks:
            out[:, :, block.first : block.last] = F.scaled_dot_product_attention(
                query[:, :, block.first : block.last],
                key[:, :, : block.keys],
                value[:, :, : block.keys],
                attn_mask=block.mask,
                scale=scale,
                enable_gqa=grouped,
            )
        return out


def attend_and_watch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few rows, and what each token gives to it.

    Args:
        query: ``[1, heads, rows, head_dim]``.
        key: ``[1, kv_heads, tokens, head_dim]`` for positions 0 .. tokens - 1.
        value: Like ``key``.
        positions: int64 ``[rows]``, ascending: the rows' positions.
        weights: float32 ``[rows]``: what a row counts.
        scale: Factor of the logits.

    Returns:
        ``[1, heads, rows, head_dim]``, and float32 ``[tokens]``: attention probability times the L2 norm of the value
        that it weighs, mean over heads, weighted sum over rows.
    """
    _, heads, rows, head_dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    out = query.new_empty(kv_heads, heads // kv_heads * rows, head_dim)
    given = torch.zeros(tokens, dtype=torch.float32, device=key.device)
    for kv_head, probabilities in enumerate(_probabilities(query, key, positions, scale)):
        given += _given(probabilities, value[0, kv_head], weights)
        out[kv_head] = probabilities.to(value.dtype) @ value[0, kv_head]
    return out.view(query.shape), given / heads


def watch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What each token gives to the attention of a few rows, for an engine that computes that itself.

    Takes what :func:`attend_and_watch` takes, and returns the second of what it does.
    """
    given = torch.zeros(key.shape[2], dtype=torch.float32, device=key.device)
    for kv_head, probabilities in enumerate(_probabilities(query, key, positions, scale)):
        given += _given(probabilities, value[0, kv_head], weights)
    return given / query.shape[1]


def _given(probabilities: torch.Tensor, value: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What tokens give to the rows of one KV head's group: float32 ``[tokens]``."""
    shares = weights.repeat(len(probabilities) // len(weights)) @ probabilities
    return shares.mul_(value.float().norm(dim=-1))


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, scale: float
) -> Iterator[torch.Tensor]:
    """Attention probabilities, float32 ``[heads / kv_heads * rows, tokens]``, one KV head after the other."""
    rows, head_dim = query.shape[2:]
    kv_heads, tokens = key.shape[1:3]
    # Before the first row's position nothing is hidden: only the last few columns need a mask.
    first = int(positions[0])
    hidden = torch.arange(first, tokens, device=key.device) > positions[:, None]
    for kv_head, group in enumerate((query[0] * scale).reshape(kv_heads, -1, head_dim)):
        logits = (group @ key[0, kv_head].T).float()
        logits.view(-1, rows, tokens)[..., first:].masked_fill_(hidden, float("-inf"))
        yield logits.softmax(dim=-1)
