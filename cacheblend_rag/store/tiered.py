"""A disk store behind a memory store."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cacheblend_rag.chunks import ChunkKV, TokenIds
from cacheblend_rag.store.base import ChunkInfo, IndexedChunk
from cacheblend_rag.store.disk import DiskStore
from cacheblend_rag.store.memory import MemoryStore


class TieredStore:
    """Reads from memory what was read or stored lately; what is stored at all is for the disk to say.

    Args:
        memory: Holds copies only.
        disk: Holds every chunk.

    Attributes:
        keep: What of a chunk is kept in memory, and handed out by :meth:`get`: all of it, unless this is exchanged.
    """

    def __init__(self, memory: MemoryStore, disk: DiskStore) -> None:
        self.memory = memory
        self.disk = disk
        self.keep: Callable[[ChunkKV], ChunkKV] = _all

    def __repr__(self) -> str:
        return f"TieredStore({self.memory!r}, {self.disk!r})"

    def __reduce__(self) -> tuple[Callable[[int, DiskStore], TieredStore], tuple[int, DiskStore]]:
        return _tiered, (self.memory.max_bytes, self.disk)  # what is in memory stays there

    @property
    def faults(self) -> int:
        """Stored chunks that could not be read since the store was opened."""
        return self.disk.faults

    def put(self, chunk: ChunkKV) -> int:
        """See :meth:`ChunkStore.put`."""
        written = self.disk.put(chunk)
        self.memory.put(self.keep(chunk))
        return written

    def get(self, key: str) -> ChunkKV | None:
        """See :meth:`ChunkStore.get`."""
        chunk = self.memory.get(key)
        if chunk is not None:
            self.disk.touch(key)  # or the disk would evict what is read most
            return chunk
        chunk = self.disk.get(key)
        if chunk is not None:
            chunk = self.keep(chunk)
            self.memory.put(chunk)
        return chunk

    def ids(self, key: str) -> TokenIds | None:
        """See :meth:`ChunkStore.ids`."""
        return self.disk.ids(key)

    def __contains__(self, key: object) -> bool:
        """See :meth:`ChunkStore.__contains__`."""
        return key in self.disk

    def delete(self, key: str) -> bool:
        """See :meth:`ChunkStore.delete`."""
        self.memory.delete(key)
        return self.disk.delete(key)

    def entries(self) -> Iterator[ChunkInfo]:
        """See :meth:`ChunkStore.entries`."""
        return self.disk.entries()

    def added_since(self, scope_digest: str, cursor: int) -> tuple[int, list[IndexedChunk]]:
        """See :meth:`ChunkStore.added_since`."""
        return self.disk.added_since(scope_digest, cursor)

    def keys_since(self, scope_digest: str, cursor: int, limit: int) -> tuple[int, list[str]]:
        """See :meth:`ChunkStore.keys_since`."""
        return self.disk.keys_since(scope_digest, cursor, limit)

    def prefetch(self, key: str) -> None:
        """See :meth:`ChunkStore.prefetch`: from disk to memory."""
        if key not in self.memory:
            self.get(key)

    def close(self) -> None:
        """See :meth:`ChunkStore.close`."""
        self.memory.close()
        self.disk.close()


def _tiered(memory_bytes: int, disk: DiskStore) -> TieredStore:
    return TieredStore(MemoryStore(memory_bytes), disk)


def _all(chunk: ChunkKV) -> ChunkKV:
    return chunk
