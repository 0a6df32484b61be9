"""Reads and writes vLLM's paged KV cache, whatever its layout.

Backends pack a block's keys and values as their kernels like them: transposed, interleaved, by instruction set. So
nothing here indexes the cache by hand. Writing is the backend's own method. Reading goes through a permutation that is
learnt once: coded values are written with the backend's method, and where they arrive tells where each element lies.

A cache of 8-bit floats holds keys and values divided by a scale of each layer. The backend's method encodes them; what
is read is decoded here.
"""

from __future__ import annotations

from typing import Any

import torch

from cacheblend_rag.errors import UnsupportedModelError

_FP8 = torch.float8_e4m3fn
# Whole numbers below are exact in every dtype of a KV cache: bfloat16 has 8 significant bits, e4m3 has 4.
_DIGIT, _FP8_DIGIT = 256, 16


class PagedKV:
    """The KV cache of the attention layers of one worker.

    Args:
        layers: The model's attention layers in order (``vllm.attention.layer.Attention``), their caches bound.
        block_size: Tokens of a block.
        num_blocks: Blocks of each layer's cache.
        model_dtype: What the model computes in.

    Attributes:
        dtype: What keys and values are read in and, by :meth:`write`, written in.
        is_float8: Whether the cache holds 8-bit floats.
        scales: What keys and what values of each layer are divided by in the cache; ones where it holds no such.

    Raises:
        UnsupportedModelError: the backend keeps its KV in a way that can't be read back.
    """

    def __init__(self, layers: list[Any], block_size: int, num_blocks: int, model_dtype: torch.dtype) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._layers = layers
        first = layers[0]
        self.num_kv_heads: int = first.num_kv_heads
        self.head_dim: int = first.head_size
        cache = first.kv_cache
        if cache.shape[0] != num_blocks or any(layer.kv_cache.shape != cache.shape for layer in layers):
            raise UnsupportedModelError(
                f"its KV cache of shape {tuple(cache.shape)} is not one of {num_blocks} blocks, alike in all layers"
            )
        self.is_float8 = cache.dtype in (torch.uint8, _FP8)  # vLLM keeps them as plain bytes
        self.dtype: torch.dtype = model_dtype if self.is_float8 else cache.dtype
        self.device: torch.device = cache.device
        self.scales = [self._scales_of(layer) for layer in layers]
        self._places = torch.stack([self._learn(which) for which in (0, 1)])
        self._strided = self._strides()

    @property
    def is_strided(self) -> bool:
        """Whether keys and values lie at regular distances, so that there are :meth:`views`."""
        return self._strided is not None

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values of a layer as views ``[blocks, block_size, kv_heads, head_dim]`` of its cache."""
        assert self._strided is not None
        cache = self._cache(layer)
        shape = (cache.shape[0], self.block_size, self.num_kv_heads, self.head_dim)
        (key_at, value_at), inner = self._strided
        first = cache.storage_offset()
        strides = (cache.stride(0), *inner)
        return cache.as_strided(shape, strides, first + key_at), cache.as_strided(shape, strides, first + value_at)

    def keys_at(self, layer: int, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The keys at some positions (int64 ``[tokens]``) of a sequence: ``[tokens, kv_heads, head_dim]``."""
        return self._at(0, layer, block_ids, positions)

    def values_at(self, layer: int, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The values at some positions; see :meth:`keys_at`."""
        return self._at(1, layer, block_ids, positions)

    def _at(self, which: int, layer: int, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not self.is_strided:
            return self._gather(layer, block_ids, which)[positions]
        at = block_ids[positions // self.block_size], positions % self.block_size
        elements = self.views(layer)[which]
        if not self.is_float8:
            return elements[at]
        return self._decode(elements.view(torch.uint8)[at], self.scales[layer][which])

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Store keys and values (``[tokens, kv_heads, head_dim]``) of a layer in slots (int64 ``[tokens]``)."""
        attention = self._layers[layer]
        attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)

    def read_keys(self, layer: int, block_ids: torch.Tensor) -> torch.Tensor:
        """All keys of some blocks of a layer: ``[blocks * block_size, kv_heads, head_dim]``.

        Args:
            layer: Index of the layer.
            block_ids: int64 ``[blocks]``.
        """
        return self._gather(layer, block_ids, 0)

    def read_values(self, layer: int, block_ids: torch.Tensor) -> torch.Tensor:
        """All values of some blocks of a layer; see :meth:`read_keys`."""
        return self._gather(layer, block_ids, 1)

    def _gather(self, layer: int, block_ids: torch.Tensor, which: int) -> torch.Tensor:
        cache: torch.Tensor = self._layers[layer].kv_cache
        bits = cache.view(torch.uint8) if self.is_float8 else cache  # float8 is not to be indexed everywhere
        blocks = bits.index_select(0, block_ids).flatten(1)
        found = blocks.index_select(1, self._places[which]).view(-1, self.num_kv_heads, self.head_dim)
        return self._decode(found, self.scales[layer][which]) if self.is_float8 else found

    def _decode(self, bits: torch.Tensor, scale: float) -> torch.Tensor:
        return (bits.view(_FP8).float() * scale).to(self.dtype)

    def _cache(self, layer: int) -> torch.Tensor:
        cache: torch.Tensor = self._layers[layer].kv_cache
        return cache.view(_FP8) if self.is_float8 else cache

    def _scales_of(self, layer: Any) -> tuple[float, float]:
        if not self.is_float8:
            return 1.0, 1.0
        if layer._k_scale.numel() != 1 or layer._v_scale.numel() != 1:
            raise UnsupportedModelError("the heads of its float8 KV cache have scales of their own")
        return float(layer._k_scale), float(layer._v_scale)

    def _learn(self, which: int) -> torch.Tensor:
        """Where in a flattened block each key (0) or value (1) lies: int64 ``[block_size * kv_heads * head_dim]``."""
        cache = self._cache(0)
        kept = cache[0].clone()  # the null block, which vLLM gives to nobody
        shape = (self.block_size, self.num_kv_heads, self.head_dim)
        count = self.block_size * self.num_kv_heads * self.head_dim
        codes = torch.arange(1, count + 1, device=self.device)  # 0 is padding, and what is not looked for
        slots = torch.arange(self.block_size, device=self.device)
        found = torch.zeros(cache[0].numel(), dtype=torch.int64, device=self.device)
        nothing = torch.zeros(shape, dtype=self.dtype, device=self.device)
        base = _FP8_DIGIT if self.is_float8 else _DIGIT
        weight = 1
        while weight <= count:
            digits = (codes // weight % base * self.scales[0][which]).to(self.dtype).view(shape)
            cache[0].zero_()
            self.write(0, *((nothing, digits) if which else (digits, nothing)), slots)
            found += cache[0].reshape(-1).to(torch.int64) * weight
            weight *= base
        cache[0].copy_(kept)
        places = torch.full((count,), -1, dtype=torch.int64, device=self.device)
        used = ((found > 0) & (found <= count)).nonzero().flatten()
        places[found[used] - 1] = used
        if bool((places < 0).any()):
            raise UnsupportedModelError("its attention backend's KV cache can't be read back")
        return places

    def _strides(self) -> tuple[tuple[int, int], tuple[int, int, int]] | None:
        """Where a block's first key and first value lie, and the strides of slots, heads and dimensions."""
        cache = self._layers[0].kv_cache
        index = torch.unravel_index(self._places.cpu(), cache.shape[1:])
        at = sum(i * stride for i, stride in zip(index, cache.stride()[1:], strict=True))
        at = torch.as_tensor(at).view(2, self.block_size, self.num_kv_heads, self.head_dim)
        strides = [int(at.select(d, 1).flatten()[0] - at.flatten()[0]) if at.shape[d] > 1 else 1 for d in (1, 2, 3)]
        expected = at[:, :1, :1, :1]
        for d, stride in enumerate(strides, start=1):
            steps = torch.arange(at.shape[d]) * stride
            expected = expected + steps.view([-1 if d == other else 1 for other in range(4)])
        if not torch.equal(at, expected) or strides[2] != 1:
            return None
        return (int(at[0].flatten()[0]), int(at[1].flatten()[0])), (strides[0], strides[1], strides[2])
