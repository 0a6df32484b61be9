"""Random chunks for the store's tests."""

from __future__ import annotations

import numpy as np
import torch

from cacheblend_rag.chunks import ChunkKV, ChunkScope, ModelFingerprint

SCOPE = ChunkScope("default", ModelFingerprint("model", "w1", "c1", "t1", "float32"), (1, 5, 9))


def make_chunk(
    seed: int,
    *,
    tokens: int = 40,
    dtype: torch.dtype = torch.float32,
    scope: ChunkScope = SCOPE,
    layers: int = 2,
    heads: int = 1,
    head_dim: int = 4,
) -> ChunkKV:
    """The chunk of a seed: random ids, and KV of random bits, NaNs and infinities among them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50_000, tokens).astype(np.int32)
    shape = (layers, 2, tokens, heads, head_dim)
    bits = rng.integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    kv = torch.from_numpy(bits).view(dtype).reshape(shape)
    scales = torch.from_numpy(rng.random((layers, 2, heads), np.float32)) if dtype == torch.float8_e4m3fn else None
    return ChunkKV(scope.key(ids), scope, ids, start=len(scope.primer_ids), kv=kv, scales=scales)


def same(a: ChunkKV | None, b: ChunkKV | None) -> bool:
    """Whether two chunks are equal bit for bit."""
    if a is None or b is None:
        return a is b
    return (
        (a.key, a.scope, a.start, a.kv.dtype, a.kv.shape) == (b.key, b.scope, b.start, b.kv.dtype, b.kv.shape)
        and a.ids.dtype == b.ids.dtype
        and np.array_equal(a.ids, b.ids)
        and torch.equal(a.kv.reshape(-1).view(torch.uint8), b.kv.reshape(-1).view(torch.uint8))
        and (a.scales is b.scales is None or (a.scales is not None and b.scales is not None))
        and (a.scales is None or b.scales is None or torch.equal(a.scales, b.scales))
    )
