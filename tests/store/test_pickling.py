"""A store that another process may open is pickled as where it is; what is in memory stays where it is."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from store_chunks import make_chunk

from cacheblend_rag.store import DiskStore, TieredStore, open_store


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
def test_a_store_is_opened_again(tmp_path: Path, memory_bytes: int):
    store = open_store(tmp_path, memory_bytes=memory_bytes, max_bytes=1 << 30)
    chunk = make_chunk(0)
    store.put(chunk)
    again = pickle.loads(pickle.dumps(store))
    assert type(again) is (TieredStore if memory_bytes else DiskStore)
    disk = again.disk if isinstance(again, TieredStore) else again
    assert (disk.directory, disk.max_bytes) == (tmp_path, 1 << 30)
    if isinstance(again, TieredStore):
        assert again.memory.max_bytes == memory_bytes
        assert chunk.key not in again.memory
    assert again.get(chunk.key) is not None
    again.close()
    store.close()


def test_a_store_in_memory_is_not():
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(open_store(None))
