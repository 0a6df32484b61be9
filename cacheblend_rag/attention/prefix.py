"""Exact-position attention in two parts, where FlashAttention 3 is there.

Most of what scattered rows see, all rows of a bucket of neighbours see: the keys up to the bucket's first position.
FlashAttention takes those, without a mask, each bucket one sequence of its own length over the same block table. What
is left, the keys from there to each row's position, the kernel of ``paged.py`` adds, going on from FlashAttention's
logarithm of the sum of exponentials. It is the diagonal of the matrix, a small share of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from cacheblend_rag.attention.paged import PagedRows, Prefix, attend_rows

BUCKET = 64
"""Rows of a bucket: a multiple of every tile of ``paged.py``."""

# Where chosen rows lie close together here and there, the bucket between two such places has a long way to go. One
# program would take as long for it as all others for the rest.
_LONG = 1024  # keys
_MOST_LONG = 32  # tiles that are shared by several programs, the longest ones


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Rows in buckets, for all layers of a pass.

    Attributes:
        rows: The rows; a bucket holds rows of one sequence.
        bounds: int32 ``[buckets + 1]``: where buckets begin.
        shared_keys: int32 ``[buckets]``: leading keys that all rows of a bucket see.
        first_keys: int32 ``[tiles]``: the same, for each tile.
        is_long: int32 ``[tiles]``: whether a tile has many keys left, see :class:`Prefix`.
        long_tiles: int32 ``[most]``: those that have, -1: no further ones.
        block_table: int32 ``[buckets, blocks]``.
    """

    rows: PagedRows
    bounds: torch.Tensor
    shared_keys: torch.Tensor
    first_keys: torch.Tensor
    is_long: torch.Tensor
    long_tiles: torch.Tensor
    block_table: torch.Tensor

    @classmethod
    def of(cls, rows: PagedRows) -> Buckets:
        """Cut rows, a multiple of :data:`BUCKET`, into buckets; nothing is read back to the host."""
        buckets = rows.positions.shape[0] // BUCKET
        tiles = rows.tile_sequence.shape[0] // buckets
        tile = BUCKET // tiles
        shared = rows.positions[::BUCKET] + 1
        first_keys = shared.repeat_interleave(tiles, output_size=buckets * tiles)
        left, longest = (rows.positions[tile - 1 :: tile] + 1 - first_keys).topk(min(_MOST_LONG, buckets * tiles))
        is_long = torch.zeros_like(first_keys).scatter_(0, longest, (left > _LONG).int())
        return cls(
            rows,
            torch.arange(0, (buckets + 1) * BUCKET, BUCKET, dtype=torch.int32, device=shared.device),
            shared,
            first_keys,
            is_long,
            torch.where(left > _LONG, longest, -1).int(),
            rows.block_table[rows.tile_sequence[::tiles].long()],
        )


def attend_buckets(
    flash_attention: Callable[..., Any],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    buckets: Buckets,
    scale: float,
) -> torch.Tensor:
    """Attend; see :func:`cacheblend_rag.attention.paged.attend_rows`.

    Args:
        flash_attention: vLLM's ``flash_attn_varlen_func``.
        query: ``[rows, heads, head_dim]``, bfloat16 or float16.
        keys: ``[blocks, block_size, kv_heads, head_dim]``.
        values: Like ``keys``.
        buckets: Where the rows stand.
        scale: Factor of the logits.
    """
    shared_out, shared_lse = flash_attention(
        q=query,
        k=keys,
        v=values,
        cu_seqlens_q=buckets.bounds,
        max_seqlen_q=BUCKET,
        seqused_k=buckets.shared_keys,
        max_seqlen_k=buckets.block_table.shape[1] * keys.shape[1],
        softmax_scale=scale,
        causal=False,
        block_table=buckets.block_table,
        return_softmax_lse=True,
        num_splits=1,
        fa_version=3,
    )
    prefix = Prefix(buckets.first_keys, shared_out, shared_lse, buckets.is_long, buckets.long_tiles)
    return attend_rows(query, keys, values, buckets.rows, scale, prefix=prefix)
