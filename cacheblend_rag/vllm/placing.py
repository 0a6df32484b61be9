"""Puts chunk KV into the paged cache, in one Triton launch for a group of layers of all chunks.

Keys are rotated to their new positions on the way, and everything is scattered to its slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import triton
import triton.language as tl

_TILE = 8  # tokens of a work item

_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of chunks on their way to the cache, as device tensors; one entry a run unless said otherwise.

    Attributes:
        addresses: int64: of the first key, first head of this rank, in layer 0, or in the first layer to place.
        whole: int32: 1 where that is layer 0, 0 where it is the first layer to place.
        layer_strides: int64: elements from a layer to the next.
        value_strides: int64: elements from a key to its value.
        item_run: int32 ``[items]``: the run that a work item of up to 8 tokens is of.
        item_start: int32 ``[items]``: its first token in the run.
        item_token: int32 ``[items]``: the same token, counted over all runs.
        item_length: int32 ``[items]``: its tokens.
        slots: int64 ``[tokens]``: where each token goes.
        cos: float32 ``[tokens, rotary_dim / 2]``: the rotation from old to new positions.
        sin: Likewise.
    """

    addresses: torch.Tensor
    whole: torch.Tensor
    layer_strides: torch.Tensor
    value_strides: torch.Tensor
    item_run: torch.Tensor
    item_start: torch.Tensor
    item_token: torch.Tensor
    item_length: torch.Tensor
    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def work_items(lengths: list[int]) -> torch.Tensor:
    """Cut runs into work items: int32 ``[4, items]``, what :class:`Runs` has of them."""
    starts = [np.arange(0, length, _TILE) for length in lengths]
    run = np.repeat(np.arange(len(lengths)), [len(start) for start in starts])
    start = np.concatenate(starts)
    before = np.cumsum([0, *lengths[:-1]])
    size = np.minimum(np.asarray(lengths)[run] - start, _TILE)
    return torch.from_numpy(np.stack([run, start, before[run] + start, size]).astype(np.int32))


def place_layers(
    runs: Runs,
    caches: torch.Tensor,
    first_layer: int,
    layers: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    token_stride: int,
) -> None:
    """Rotate and scatter some layers of some runs.

    Args:
        runs: What to place.
        caches: int64 ``[all layers, 2]``: addresses of each layer's first key and first value in the cache.
        first_layer: First layer to place.
        layers: How many.
        keys: A layer's keys, ``[blocks, block_size, kv_heads, head_dim]``, for shape, strides and dtype: all layers'
            are alike.
        values: Likewise.
        token_stride: Elements from a token to the next in the source.
    """
    heads, head_dim = keys.shape[2:]
    items = runs.item_run.shape[0]
    _place[(items, layers)](
        runs.addresses, runs.whole, runs.layer_strides, runs.value_strides, runs.item_run, runs.item_start,
        runs.item_token, runs.item_length, runs.slots, runs.cos, runs.sin, caches, first_layer, token_stride,
        *keys.stride()[:3], *values.stride()[:3],
        ELEMENT=_ELEMENTS[keys.dtype], PAGE=keys.shape[1], HEADS=heads, HEADS_PADDED=triton.next_power_of_2(heads),
        HEAD_DIM=head_dim, HEAD_DIM_PADDED=triton.next_power_of_2(head_dim), HALF=runs.cos.shape[1],
        HALF_PADDED=triton.next_power_of_2(runs.cos.shape[1]), TILE=_TILE, num_warps=8,
    )  # fmt: skip


@triton.jit
def _place(
    addresses, whole_chunks, layer_strides, value_strides, item_run, item_start, item_token, item_length, slots,
    cos, sin, caches, first_layer, token_stride,
    key_block_stride, key_slot_stride, key_head_stride, value_block_stride, value_slot_stride, value_head_stride,
    ELEMENT: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: some tokens of one run in one layer."""
    offset = tl.arange(0, TILE * HEADS_PADDED)
    token, head = offset // HEADS_PADDED, offset % HEADS_PADDED
    half = tl.arange(0, HALF_PADDED)
    dim = tl.arange(0, HEAD_DIM_PADDED)
    item = tl.program_id(0)
    layer = first_layer + tl.program_id(1)
    run = tl.load(item_run + item)
    inside = (token < tl.load(item_length + item)) & (head < HEADS)
    source = (
        tl.load(addresses + run).to(tl.pointer_type(ELEMENT))
        + (tl.program_id(1) + first_layer * tl.load(whole_chunks + run)).to(tl.int64) * tl.load(layer_strides + run)
        + (tl.load(item_start + item) + token).to(tl.int64) * token_stride
        + head * HEAD_DIM
    )
    number = (tl.load(item_token + item) + token).to(tl.int64)
    slot = tl.load(slots + number, mask=inside, other=0)
    block, place = slot // PAGE, slot % PAGE
    key_to = (
        tl.load(caches + 2 * layer).to(tl.pointer_type(ELEMENT))
        + block * key_block_stride + place * key_slot_stride + head * key_head_stride
    )  # fmt: skip
    value_to = (
        tl.load(caches + 2 * layer + 1).to(tl.pointer_type(ELEMENT))
        + block * value_block_stride + place * value_slot_stride + head * value_head_stride
    )  # fmt: skip
    rotated = inside[:, None] & (half < HALF)[None, :]
    whole = inside[:, None] & (dim < HEAD_DIM)[None, :]
    first = tl.load(source[:, None] + half[None, :], mask=rotated, other=0.0)
    second = tl.load(source[:, None] + HALF + half[None, :], mask=rotated, other=0.0)
    value = tl.load(source[:, None] + tl.load(value_strides + run) + dim[None, :], mask=whole, other=0.0)
    angle = number[:, None] * HALF + half[None, :]
    c = tl.load(cos + angle, mask=rotated, other=0.0)
    s = tl.load(sin + angle, mask=rotated, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    tl.store(key_to[:, None] + half[None, :], (x * c - y * s).to(ELEMENT), mask=rotated)
    tl.store(key_to[:, None] + HALF + half[None, :], (y * c + x * s).to(ELEMENT), mask=rotated)
    if HEAD_DIM > 2 * HALF:
        rest = whole & (dim >= 2 * HALF)[None, :]
        tl.store(key_to[:, None] + dim[None, :], tl.load(source[:, None] + dim[None, :], mask=rest), mask=rest)
    tl.store(value_to[:, None] + dim[None, :], value, mask=whole)
