"""Exact-position attention over a paged KV cache, as one Triton kernel.

Rows are chosen tokens at any positions; a row at position p sees keys 0..p. A program takes a tile of neighbouring rows
with all query heads of one KV head (so the tile's positions lie close together) and walks the keys up to the tile's
last position; only the keys between its first and its last position need a mask. Everything that varies between
requests is read from device memory, so a launch can be part of a CUDA graph, and nothing comes back to the host.

Three ways to use it, with the same results:

    plain    each tile walks all its keys
    split    few rows over many keys: each tile's keys are divided among programs, and a second kernel combines them
    prefix   another kernel has attended to the keys before a tile's first one (``prefix.py``); this one goes on, by
             itself where few keys are left, split in the few tiles where there are many
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LONG_SPLITS = 8  # programs that share a long tile


@dataclasses.dataclass(frozen=True)
class PagedRows:
    """Rows of one or several sequences in a paged KV cache.

    Attributes:
        positions: int32 ``[rows]``: each row's position in its sequence, ascending within a tile of
            :func:`tile_rows`. The number of rows is a multiple of the tile; a row may be repeated to fill one.
        tile_sequence: int32 ``[rows / tile]``: the sequence whose rows a tile holds.
        block_table: int32 ``[sequences, blocks]``.
    """

    positions: torch.Tensor
    tile_sequence: torch.Tensor
    block_table: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What another kernel has computed, for each tile, of the keys before one.

    Attributes:
        first_keys: int32 ``[tiles]``: the first key that is left.
        out: ``[rows, heads, head_dim]`` of the query's dtype: its result.
        lse: float32 ``[heads, rows]``: the natural logarithm of its sum of exponentials.
        is_long: int32 ``[tiles]``: 1 where a tile is among ``long_tiles``.
        long_tiles: int32 ``[any]``: tiles that several programs share, for what is left is long; -1: none.
    """

    first_keys: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    is_long: torch.Tensor
    long_tiles: torch.Tensor


def tile_rows(heads: int, kv_heads: int) -> int:
    """Rows of a tile: with the query heads that share a KV head, 64 rows of a matrix product, 16 rows at least."""
    group: int = triton.next_power_of_2(heads // kv_heads)
    return max(16, 64 // group)


def attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: PagedRows,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    splits: int = 1,
    lse: torch.Tensor | None = None,
    prefix: Prefix | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """Attend.

    Args:
        query: ``[rows, heads, head_dim]``, bfloat16, float16 or float32; contiguous in its last dimension.
        keys: ``[blocks, block_size, kv_heads, head_dim]`` of the query's dtype or float8; any strides but in the last
            dimension.
        values: Like ``keys``.
        rows: Where the rows stand.
        scale: Factor of the logits.
        out: Where the result goes; like ``query``, contiguous. None: a new tensor.
        splits: Programs that share the keys of a tile.
        lse: float32 ``[rows, heads]``, written: base-2 logarithm of the sum of the exponentials of the scaled logits.
        prefix: What another kernel has computed. Not with ``splits`` or ``lse``.
        key_scale: What float8 keys were divided by.
        value_scale: What float8 values were divided by.

    Returns:
        ``[rows, heads, head_dim]``.
    """
    count, heads, head_dim = query.shape
    kv_heads = keys.shape[2]
    tile = tile_rows(heads, kv_heads)
    padded = max(16, triton.next_power_of_2(head_dim))
    block_keys, warps, stages = _launch(padded, query.element_size())
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    strides = (
        query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3], rows.block_table.stride(0)
    )  # fmt: skip

    def attend(tiles: int, splits: int, result: torch.Tensor, log_sums: torch.Tensor | None, listed: bool) -> None:
        _attend[(tiles, kv_heads, splits)](
            query, keys, values, result, result if log_sums is None else log_sums, rows.positions, rows.tile_sequence,
            rows.block_table, *given, scale * key_scale, value_scale, count, heads, *strides,
            PAGE=keys.shape[1], GROUP=heads // kv_heads, GROUP_PADDED=triton.next_power_of_2(heads // kv_heads),
            HEAD_DIM=head_dim, HEAD_DIM_PADDED=padded, TILE=tile, KEYS=block_keys, SPLITS=splits,
            HAS_PREFIX=prefix is not None, LISTED=listed, STORE_LSE=log_sums is not None, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip

    def share(tiles: int, splits: int, listed: bool) -> None:
        """Let several programs attend for each tile, then combine what they have."""
        partial = out.new_empty((splits, tiles * tile, heads, head_dim), dtype=torch.float32)
        log_sums = out.new_empty((splits, tiles * tile, heads), dtype=torch.float32)
        attend(tiles, splits, partial, log_sums, listed)
        _combine[(tiles * tile, heads)](
            partial, log_sums, out, out if lse is None else lse, *given, count, heads,
            HEAD_DIM=head_dim, HEAD_DIM_PADDED=padded, TILE=tile, SPLITS=splits, LISTED=listed,
            STORE_LSE=lse is not None, num_warps=1,
        )  # fmt: skip

    if prefix is not None:
        given = (prefix.first_keys, prefix.out, prefix.lse, prefix.is_long, prefix.long_tiles)
        attend(count // tile, 1, out, None, False)
        share(len(prefix.long_tiles), _LONG_SPLITS, True)
        return out
    given = (rows.positions, query, rows.positions, rows.positions, rows.positions)  # not read
    if splits == 1:
        attend(count // tile, 1, out, lse, False)
    else:
        share(count // tile, splits, False)
    return out


def _launch(head_dim: int, element_size: int) -> tuple[int, int, int]:
    """Keys of a step, warps and pipeline stages: what fits the shared memory of a GPU with 100 KB or more of it."""
    if element_size == 4:
        return (32 if head_dim <= 128 else 16), 8, 1
    return (64, 4, 3) if head_dim <= 128 else (32, 8, 2)


@triton.jit
def _step(
    acc, top, total, query, start, end, position, sequence, kv_head, keys, values, block_table,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    table_stride, scale,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys ``start .. start + KEYS - 1``, those from ``end`` on left out."""
    place = start + tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    if MASKED:
        block = tl.load(block_table + sequence * table_stride + place // PAGE, mask=place < end, other=0).to(tl.int64)
    else:
        block = tl.load(block_table + sequence * table_stride + place // PAGE).to(tl.int64)
    slot = place % PAGE
    key_at = keys + kv_head * key_head_stride + block * key_block_stride + slot * key_slot_stride
    value_at = values + kv_head * value_head_stride + block * value_block_stride + slot * value_slot_stride
    if HEAD_DIM == HEAD_DIM_PADDED:
        key = tl.load(key_at[None, :] + dim[:, None]).to(query.dtype)
        value = tl.load(value_at[:, None] + dim[None, :]).to(query.dtype)
    else:
        key = tl.load(key_at[None, :] + dim[:, None], mask=dim[:, None] < HEAD_DIM, other=0.0).to(query.dtype)
        value = tl.load(value_at[:, None] + dim[None, :], mask=dim[None, :] < HEAD_DIM, other=0.0).to(query.dtype)
    logits = tl.dot(query, key, input_precision="ieee") * scale
    if MASKED:
        logits = tl.where((place[None, :] <= position[:, None]) & (place[None, :] < end), logits, float("-inf"))
        # What stands in a slot that nobody has written may be NaN, and nothing times NaN is NaN.
        value = tl.where((place < end)[:, None], value, 0.0)
    new_top = tl.maximum(top, tl.max(logits, 1))
    safe_top = new_top
    if MASKED:
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
    weight = tl.exp2(logits - safe_top[:, None])
    keep = tl.exp2(top - safe_top)
    total = total * keep + tl.sum(weight, 1)
    acc = acc * keep[:, None] + tl.dot(weight.to(query.dtype), value, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _attend(
    query, keys, values, out, lse, positions, tile_sequence, block_table,
    first_keys, prefix_out, prefix_lse, is_long, long_tiles, scale, value_scale, rows, heads,
    query_row_stride, query_head_stride, key_block_stride, key_slot_stride, key_head_stride,
    value_block_stride, value_slot_stride, value_head_stride, table_stride,
    PAGE: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    HAS_PREFIX: tl.constexpr, LISTED: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows, one KV head, one share of the keys. Late tiles, which have most keys, go first."""
    if LISTED:
        tile = tl.load(long_tiles + tl.program_id(0))
        if tile < 0:
            return
    else:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        if HAS_PREFIX:  # noqa: SIM102
            if tl.load(is_long + tile) != 0:
                return
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    offset = tl.arange(0, TILE * GROUP_PADDED)
    row = tile * TILE + offset // GROUP_PADDED
    member = offset % GROUP_PADDED
    head = kv_head * GROUP + member
    dim = tl.arange(0, HEAD_DIM_PADDED)
    mask = (member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    at = row[:, None].to(tl.int64) * query_row_stride + head[:, None] * query_head_stride + dim[None, :]
    q = tl.load(query + at, mask=mask, other=0.0)
    position = tl.load(positions + row)
    sequence = tl.load(tile_sequence + tile).to(tl.int64)
    first = tl.load(first_keys + tile) if HAS_PREFIX else 0
    end = tl.max(position, 0) + 1
    seen_by_all = tl.min(position, 0) + 1
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - first, SPLITS), KEYS) * KEYS
        first += split * share
        end = tl.minimum(end, first + share)
        seen_by_all = tl.minimum(seen_by_all, end)
    unmasked_end = first + tl.maximum(seen_by_all - first, 0) // KEYS * KEYS

    scale = scale * _LOG2E
    acc = tl.zeros([TILE * GROUP_PADDED, HEAD_DIM_PADDED], tl.float32)
    top = tl.full([TILE * GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([TILE * GROUP_PADDED], tl.float32)
    for start in range(first, unmasked_end, KEYS):
        acc, top, total = _step(
            acc, top, total, q, start, end, position, sequence, kv_head, keys, values, block_table,
            key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride,
            value_head_stride, table_stride, scale, PAGE, HEAD_DIM, HEAD_DIM_PADDED, KEYS, False,
        )  # fmt: skip
    for start in range(unmasked_end, end, KEYS):
        acc, top, total = _step(
            acc, top, total, q, start, end, position, sequence, kv_head, keys, values, block_table,
            key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride,
            value_head_stride, table_stride, scale, PAGE, HEAD_DIM, HEAD_DIM_PADDED, KEYS, True,
        )  # fmt: skip

    acc = acc * value_scale
    if HAS_PREFIX and not LISTED:
        before = tl.load(prefix_lse + head.to(tl.int64) * rows + row, mask=member < GROUP, other=0.0) * _LOG2E
        new_top = tl.maximum(top, before)
        keep, add = tl.exp2(top - new_top), tl.exp2(before - new_top)
        result_at = (row[:, None].to(tl.int64) * heads + head[:, None]) * HEAD_DIM + dim[None, :]
        earlier = tl.load(prefix_out + result_at, mask=mask, other=0.0).to(tl.float32)
        acc = acc * keep[:, None] + earlier * add[:, None]
        total = total * keep + add
        top = new_top
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]  # a share without keys
    if LISTED:  # what is shared has rows of its own
        row = tl.program_id(0) * TILE + offset // GROUP_PADDED
        rows = tl.num_programs(0) * TILE
    to_row = split.to(tl.int64) * rows + row
    to = (to_row[:, None] * heads + head[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=mask)
    if STORE_LSE:
        log_sum = tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
        tl.store(lse + to_row * heads + head, log_sum, mask=member < GROUP)


@triton.jit
def _combine(
    partial, log_sums, out, lse, first_keys, prefix_out, prefix_lse, is_long, long_tiles, rows, heads,
    HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    LISTED: tl.constexpr, STORE_LSE: tl.constexpr,
):  # fmt: skip
    """Bring the shares of one row and head together, and what a listed tile has of its prefix."""
    shared_row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    shared_rows = tl.num_programs(0)
    row = shared_row
    if LISTED:
        tile = tl.load(long_tiles + shared_row // TILE)
        if tile < 0:
            return
        row = tile.to(tl.int64) * TILE + shared_row % TILE
    dim = tl.arange(0, HEAD_DIM_PADDED)
    top = float("-inf")
    if LISTED:
        top = tl.load(prefix_lse + head.to(tl.int64) * rows + row) * _LOG2E
    for split in range(SPLITS):
        top = tl.maximum(top, tl.load(log_sums + (split * shared_rows + shared_row) * heads + head))
    acc = tl.zeros([HEAD_DIM_PADDED], tl.float32)
    total = 0.0
    to = (row * heads + head) * HEAD_DIM + dim
    if LISTED:
        weight = tl.exp2(tl.load(prefix_lse + head.to(tl.int64) * rows + row) * _LOG2E - top)
        acc += weight * tl.load(prefix_out + to, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
        total += weight
    for split in range(SPLITS):
        weight = tl.exp2(tl.load(log_sums + (split * shared_rows + shared_row) * heads + head) - top)
        at = ((split * shared_rows + shared_row) * heads + head) * HEAD_DIM + dim
        acc += weight * tl.load(partial + at, mask=dim < HEAD_DIM, other=0.0)
        total += weight
    tl.store(out + to, (acc / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    if STORE_LSE:
        tl.store(lse + row * heads + head, top + tl.log2(total))
