"""What each token of a paged KV cache gives to the attention of a question's rows, as one Triton kernel.

It runs beside the attention itself, which leaves the logarithm of each row's sum of exponentials: with that, a key's
share of a row is one product and one exponential, and no matrix of rows and keys is ever in memory. What the key gives
is that share times the norm of its value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cacheblend_rag.attention.paged import PagedRows, tile_rows

_LOG2E = tl.constexpr(1.4426950408889634)
_KEYS = 64


def watch_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    lse: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
    given: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Add what tokens give to rows: attention probability times the L2 norm of the value it weighs.

    Args:
        query: ``[rows, heads, head_dim]``.
        keys: ``[blocks, block_size, kv_heads, head_dim]``.
        values: Like ``keys``.
        rows: Where the rows stand.
        lse: float32 ``[rows, heads]``, as :func:`attend_rows` writes it.
        weights: float32 ``[rows]``: what a row counts; 0 for one that isn't watched.
        scale: Factor of the logits.
        given: float32 ``[sequences, kv_heads, tokens]``: what is added to. Keys from ``tokens`` on are left out.
        key_scale: What float8 keys were divided by.
        value_scale: Likewise values.
    """
    count, heads, head_dim = query.shape
    _, kv_heads, tokens = given.shape
    group = heads // kv_heads
    _watch[(triton.cdiv(tokens, _KEYS), kv_heads)](
        query, keys, values, lse, rows.positions, rows.tile_sequence, weights, rows.block_table, given,
        scale * key_scale, value_scale, count, heads, tokens, query.stride(0), query.stride(1), *keys.stride()[:3],
        *values.stride()[:3], rows.block_table.stride(0),
        PAGE=keys.shape[1], GROUP=group, GROUP_PADDED=triton.next_power_of_2(group), HEAD_DIM=head_dim,
        HEAD_DIM_PADDED=max(16, triton.next_power_of_2(head_dim)), TILE=tile_rows(heads, kv_heads), KEYS=_KEYS,
        num_warps=8, num_stages=1 if query.element_size() == 4 else 2,
    )  # fmt: skip


@triton.jit
def _watch(
    query, keys, values, lse, positions, tile_sequence, weights, block_table, given, scale, value_scale, rows, heads,
    tokens, query_row_stride, query_head_stride, key_block_stride, key_slot_stride, key_head_stride, value_block_stride,
    value_slot_stride, value_head_stride, table_stride,
    PAGE: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: some keys of each sequence, one KV head, under all rows."""
    start = tl.program_id(0) * KEYS
    kv_head = tl.program_id(1)
    place = start + tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    offset = tl.arange(0, TILE * GROUP_PADDED)
    member = offset % GROUP_PADDED
    head = kv_head * GROUP + member
    for tile in range(rows // TILE):
        row = tile * TILE + offset // GROUP_PADDED
        position = tl.load(positions + row)
        weight = tl.load(weights + row)
        # The keys after the last position are in blocks that the sequence may not have.
        watched = (tl.max(position, 0) >= start) & (tl.max(weight, 0) > 0)
        if watched:
            sequence = tl.load(tile_sequence + tile).to(tl.int64)
            in_use = place <= tl.max(position, 0)
            block = tl.load(block_table + sequence * table_stride + place // PAGE, mask=in_use, other=0).to(tl.int64)
            key_at = keys + kv_head * key_head_stride + block * key_block_stride + (place % PAGE) * key_slot_stride
            value_at = values + kv_head * value_head_stride + block * value_block_stride
            value_at += (place % PAGE) * value_slot_stride
            mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
            at = row[:, None].to(tl.int64) * query_row_stride + head[:, None] * query_head_stride + dim[None, :]
            q = tl.load(query + at, mask=mask, other=0.0)
            key = tl.load(key_at[None, :] + dim[:, None], mask=dim[:, None] < HEAD_DIM, other=0.0).to(q.dtype)
            logits = tl.dot(q, key, input_precision="ieee") * (scale * _LOG2E)
            log_sum = tl.load(lse + row.to(tl.int64) * heads + head, mask=member < GROUP, other=0.0)
            seen = (place[None, :] <= position[:, None]) & (member < GROUP)[:, None]
            share = tl.where(seen, tl.exp2(logits - log_sum[:, None]), 0.0)
            value_mask = in_use[None, :] & (dim < HEAD_DIM)[:, None]
            value = tl.load(value_at[None, :] + dim[:, None], mask=value_mask, other=0.0).to(q.dtype).to(tl.float32)
            norm = tl.sqrt(tl.sum(value * value, 0)) * value_scale
            # No other program adds here: atomic only to be in order with this one's next tile.
            at = given + (sequence * tl.num_programs(1) + kv_head) * tokens + place
            tl.atomic_add(at, tl.sum(share * weight[:, None], 0) * norm, mask=place < tokens, sem="relaxed")
