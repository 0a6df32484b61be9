"""Reads and writes vLLM's paged KV cache, whatever its layout.

Backends pack a block's keys and values as their kernels like them: transposed, interleaved, by instruction set. So
nothing here indexes the cache by hand. Writing is the backend's own method. Reading goes through a permutation that is
learnt once: coded values are written with the backend's method, and where they arrive tells where each element lies.
"""

from __future__ import annotations

from typing import Any

import torch

from cacheblend_rag.errors import UnsupportedModelError

# Every whole number below is exact in every dtype of a KV cache, bfloat16 with its 8 significant bits included.
_DIGIT = 256


class PagedKV:
    """The KV cache of the attention layers of one worker.

    Args:
        layers: The model's attention layers in order (``vllm.attention.layer.Attention``), their caches bound.
        block_size: Tokens of a block.
        num_blocks: Blocks of each layer's cache.

    Raises:
        UnsupportedModelError: the backend keeps its KV in a way that can't be read back.
    """

    def __init__(self, layers: list[Any], block_size: int, num_blocks: int) -> None:
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
        self.dtype: torch.dtype = cache.dtype
        self.device: torch.device = cache.device
        self._places = self._learn()
        self._strided = self._strides()

    @property
    def is_strided(self) -> bool:
        """Whether keys and values lie at regular distances, so that there are :meth:`views`."""
        return self._strided is not None

    def views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and all values of a layer as views ``[blocks, block_size, kv_heads, head_dim]`` of its cache."""
        assert self._strided is not None
        cache: torch.Tensor = self._layers[layer].kv_cache
        shape = (cache.shape[0], self.block_size, self.num_kv_heads, self.head_dim)
        (key_at, value_at), inner = self._strided
        first = cache.storage_offset()
        strides = (cache.stride(0), *inner)
        return cache.as_strided(shape, strides, first + key_at), cache.as_strided(shape, strides, first + value_at)

    def keys_at(self, layer: int, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The keys at some positions (int64 ``[tokens]``) of a sequence: ``[tokens, kv_heads, head_dim]``."""
        if not self.is_strided:
            return self.read_keys(layer, block_ids)[positions]
        return self.views(layer)[0][block_ids[positions // self.block_size], positions % self.block_size]

    def values_at(self, layer: int, block_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The values at some positions (int64 ``[tokens]``) of a sequence: ``[tokens, kv_heads, head_dim]``."""
        if not self.is_strided:
            return self.read_values(layer, block_ids)[positions]
        return self.views(layer)[1][block_ids[positions // self.block_size], positions % self.block_size]

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
        return self._gather(layer, block_ids, self._places[0])

    def read_values(self, layer: int, block_ids: torch.Tensor) -> torch.Tensor:
        """All values of some blocks of a layer; see :meth:`read_keys`."""
        return self._gather(layer, block_ids, self._places[1])

    def _gather(self, layer: int, block_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        cache: torch.Tensor = self._layers[layer].kv_cache
        blocks = cache.index_select(0, block_ids).flatten(1)
        return blocks.index_select(1, places).view(-1, self.num_kv_heads, self.head_dim)

    def _learn(self) -> torch.Tensor:
        """Where in a flattened block each key and value lies: int64 ``[2, block_size * kv_heads * head_dim]``."""
        cache = self._layers[0].kv_cache
        kept = cache[0].clone()  # the null block, which vLLM gives to nobody
        shape = (self.block_size, self.num_kv_heads, self.head_dim)
        count = 2 * self.block_size * self.num_kv_heads * self.head_dim
        codes = torch.arange(1, count + 1, device=self.device)  # 0 is padding
        slots = torch.arange(self.block_size, device=self.device)
        found = torch.zeros(cache[0].numel(), dtype=torch.int64, device=self.device)
        weight = 1
        while weight <= count:
            digits = (codes // weight % _DIGIT).to(self.dtype)
            cache[0].zero_()
            self.write(0, digits[: count // 2].view(shape), digits[count // 2 :].view(shape), slots)
            found += cache[0].reshape(-1).to(torch.int64) * weight
            weight *= _DIGIT
        cache[0].copy_(kept)
        places = torch.full((count,), -1, dtype=torch.int64, device=self.device)
        used = ((found > 0) & (found <= count)).nonzero().flatten()
        places[found[used] - 1] = used
        if bool((places < 0).any()):
            raise UnsupportedModelError("its attention backend's KV cache can't be read back")
        return places.view(2, -1)

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
