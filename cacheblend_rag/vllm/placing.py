"""Puts chunk KV into the paged cache, in one Triton launch for a group of layers of all chunks.

On the way what a codec has encoded is decoded, keys are rotated to their new positions, a cache of 8-bit floats gets
such, and everything is scattered to its slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl

_TILE = 8  # tokens of a work item

_ELEMENTS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
}


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of chunks on their way to the cache, as device tensors.

    Attributes:
        table: int64 ``[8, runs]``, one row each:
            the address of the first key, in layer 0 or in the first layer to place;
            1 where that is layer 0, 0 where it is the first layer to place;
            elements from a layer to the next;
            elements from a key to its value;
            the position that the first token was computed at;
            the position where it goes;
            the address of the block table (int64) of the prompt that it goes to;
            the address of its scales (``ChunkKV.scales``); 0: none.
        items: int32 ``[3, items]``, work items of up to 8 tokens: the run, its first token in the run, its tokens.
        dtype: Of the chunks' elements: the model's, or float8.
        scales: What the addresses in the table point to.
    """

    table: torch.Tensor
    items: torch.Tensor
    dtype: torch.dtype
    scales: torch.Tensor | None


def work_items(lengths: list[int]) -> torch.Tensor:
    """Cut runs into work items; see :class:`Runs`."""
    starts = [np.arange(0, length, _TILE) for length in lengths]
    run = np.repeat(np.arange(len(lengths)), [len(start) for start in starts])
    start = np.concatenate(starts)
    size = np.minimum(np.asarray(lengths)[run] - start, _TILE)
    return torch.from_numpy(np.stack([run, start, size]).astype(np.int32))


def place_layers(
    runs: Runs,
    caches: torch.Tensor,
    first_layer: int,
    layers: int,
    cos_sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cache_scales: torch.Tensor,
    token_stride: int,
) -> None:
    """Rotate and scatter some layers of some runs.

    Args:
        runs: What to place.
        caches: int64 ``[all layers, 2]``: addresses of each layer's first key and first value in the cache.
        first_layer: First layer to place.
        layers: How many.
        cos_sin: ``[positions, rotary_dim]``: the model's own rotation, cosines first; see ``rope.py``.
        keys: A layer's keys, ``[blocks, block_size, kv_heads, head_dim]``, for shape, strides and dtype: all layers'
            are alike.
        values: Likewise.
        cache_scales: float32 ``[all layers, 2]``: what each layer's keys and values are divided by in a float8 cache.
        token_stride: Elements from a token to the next in the source.
    """
    heads, head_dim = keys.shape[2:]
    half = cos_sin.shape[1] // 2
    items = runs.items.shape[1]
    float8 = torch.float8_e4m3fn
    _place[(items, layers)](
        runs.table, runs.items, cos_sin, caches, cache_scales, runs.table.shape[1], items, first_layer, token_stride,
        *keys.stride()[:3], *values.stride()[:3],
        SOURCE=_ELEMENTS[runs.dtype], ELEMENT=_ELEMENTS[keys.dtype], DECODE=runs.dtype == float8,
        ENCODE=keys.dtype == float8, PAGE=keys.shape[1], HEADS=heads, HEADS_PADDED=triton.next_power_of_2(heads),
        HEAD_DIM=head_dim, HEAD_DIM_PADDED=triton.next_power_of_2(head_dim), HALF=half,
        HALF_PADDED=triton.next_power_of_2(half), TILE=_TILE, num_warps=8,
    )  # fmt: skip


@triton.jit
def _store(at, x, factor, mask, ELEMENT: tl.constexpr, SCALE: tl.constexpr, ENCODE: tl.constexpr):
    """Store what is multiplied by a factor, without which nothing is rounded that need not be."""
    if SCALE:
        x = x.to(tl.float32) * factor[:, None]
    if ENCODE:  # out of range would be NaN
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    tl.store(at, x.to(ELEMENT), mask=mask)


# What differs from prompt to prompt must not be compiled for: that takes a second, in the middle of a step.
@triton.jit(do_not_specialize=["runs", "items", "first_layer"])
def _place(
    table, work, cos_sin, caches, cache_scales, runs, items, first_layer, token_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    SOURCE: tl.constexpr, ELEMENT: tl.constexpr, DECODE: tl.constexpr, ENCODE: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_PADDED: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one run in one layer."""
    offset = tl.arange(0, TILE * HEADS_PADDED)
    token, head = offset // HEADS_PADDED, offset % HEADS_PADDED
    half = tl.arange(0, HALF_PADDED)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    item = tl.program_id(0)
    layer = first_layer + tl.program_id(1)
    run = tl.load(work + item)
    token += tl.load(work + items + item)
    inside = (offset // HEADS_PADDED < tl.load(work + 2 * items + item)) & (head < HEADS)
    whole_chunk = tl.load(table + runs + run).to(tl.int32)
    layer_stride, value_stride = tl.load(table + 2 * runs + run), tl.load(table + 3 * runs + run)
    source = (
        tl.load(table + run).to(tl.pointer_type(SOURCE))
        + (tl.program_id(1) + first_layer * whole_chunk).to(tl.int64) * layer_stride
        + token.to(tl.int64) * token_stride
        + head * HEAD_DIM
    )
    old = tl.load(table + 4 * runs + run) + token
    new = tl.load(table + 5 * runs + run) + token
    block_table = tl.load(table + 6 * runs + run).to(tl.pointer_type(tl.int64))
    block = tl.load(block_table + new // PAGE, mask=inside, other=0)
    place = new % PAGE
    key_to = (
        tl.load(caches + 2 * layer).to(tl.pointer_type(ELEMENT))
        + block * key_block_stride + place * key_slot_stride + head * key_head_stride
    )  # fmt: skip
    value_to = (
        tl.load(caches + 2 * layer + 1).to(tl.pointer_type(ELEMENT))
        + block * value_block_stride + place * value_slot_stride + head * value_head_stride
    )  # fmt: skip
    key_factor = tl.full([TILE * HEADS_PADDED], 1.0, tl.float32)
    value_factor = key_factor
    if DECODE:
        scale_at = tl.load(table + 7 * runs + run).to(tl.pointer_type(tl.float32))
        scale_at += layer * 2 * (token_stride // HEAD_DIM) + head
        key_factor *= tl.load(scale_at, mask=inside, other=1.0)
        value_factor *= tl.load(scale_at + token_stride // HEAD_DIM, mask=inside, other=1.0)
    if ENCODE:
        key_factor /= tl.load(cache_scales + 2 * layer)
        value_factor /= tl.load(cache_scales + 2 * layer + 1)
    SCALE: tl.constexpr = DECODE or ENCODE
    rotated = inside[:, None] & (half < HALF)[None, :]
    whole = inside[:, None] & (dim < HEAD_DIM)[None, :]
    first = tl.load(source[:, None] + half[None, :], mask=rotated, other=0.0)
    second = tl.load(source[:, None] + HALF + half[None, :], mask=rotated, other=0.0)
    value = tl.load(source[:, None] + value_stride + dim[None, :], mask=whole, other=0.0)
    old_angle = cos_sin + old[:, None] * (2 * HALF) + half[None, :]
    new_angle = cos_sin + new[:, None] * (2 * HALF) + half[None, :]
    old_cos = tl.load(old_angle, mask=rotated, other=1.0).to(tl.float32)
    old_sin = tl.load(old_angle + HALF, mask=rotated, other=0.0).to(tl.float32)
    new_cos = tl.load(new_angle, mask=rotated, other=1.0).to(tl.float32)
    new_sin = tl.load(new_angle + HALF, mask=rotated, other=0.0).to(tl.float32)
    norm = old_cos * old_cos + old_sin * old_sin  # of an attention factor: rope.shift_table
    c = (new_cos * old_cos + new_sin * old_sin) / norm
    s = (new_sin * old_cos - new_cos * old_sin) / norm
    x, y = first.to(tl.float32), second.to(tl.float32)
    _store(key_to[:, None] + half[None, :], x * c - y * s, key_factor, rotated, ELEMENT, SCALE, ENCODE)
    _store(key_to[:, None] + HALF + half[None, :], y * c + x * s, key_factor, rotated, ELEMENT, SCALE, ENCODE)
    if HEAD_DIM > 2 * HALF:
        rest = whole & (dim >= 2 * HALF)[None, :]
        unrotated = tl.load(source[:, None] + dim[None, :], mask=rest, other=0.0)
        _store(key_to[:, None] + dim[None, :], unrotated, key_factor, rest, ELEMENT, SCALE, ENCODE)
    _store(value_to[:, None] + dim[None, :], value, value_factor, whole, ELEMENT, SCALE, ENCODE)
