"""What the tests' processes do to a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_chunks import make_chunk, same

from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import DiskStore

COUNT = 200
LIMIT = 120 * 1024  # bytes: about half of all chunks


def chunk_of(n: int) -> ChunkKV:
    return make_chunk(n, tokens=16 + n % 40, layers=1, head_dim=2)


def churn(store: DiskStore, seed: int) -> int:
    """Put, get and delete at random; every chunk read must be right. Returns the hits."""
    rng = np.random.default_rng(seed)
    hits = 0
    for n in rng.permutation(COUNT).tolist():
        store.put(chunk_of(n))
        for m in rng.integers(COUNT, size=4).tolist():
            wanted = chunk_of(m)
            if wanted.key in store:
                store.ids(wanted.key)
            chunk = store.get(wanted.key)
            assert chunk is None or same(chunk, wanted)
            hits += chunk is not None
        if n % 5 == 0:
            store.delete(chunk_of(int(rng.integers(COUNT))).key)
    return hits


def churn_in_process(directory: Path, seed: int) -> tuple[int, int]:
    store = DiskStore(directory, LIMIT)
    hits = churn(store, seed)
    store.close()
    return hits, store.faults


def fill_up(directory: Path) -> None:
    """Store larger and larger chunks until it can't, then check that all before are there."""
    store = DiskStore(directory)
    stored = []
    with pytest.raises(StoreError, match="free some space"):
        for n in range(14):
            chunk = make_chunk(n, tokens=64 << n)
            assert store.put(chunk) > 0
            stored.append(chunk)
    assert stored
    assert all(same(store.get(chunk.key), chunk) for chunk in stored)
    assert list((directory / "tmp").iterdir()) == []
    assert {info.key for info in store.entries()} == {chunk.key for chunk in stored}
    assert {check.state for check in store.verify()} == {"ok"}
    assert store.delete(stored.pop().key), "a full store must still let go of chunks"
    store.close()
    store = DiskStore(directory)
    assert all(same(store.get(chunk.key), chunk) for chunk in stored)
    store.close()
