"""Chunks in this process's memory."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator

from cacheblend_rag.anchors import sample_anchors
from cacheblend_rag.chunks import ChunkKV, TokenIds
from cacheblend_rag.store.base import ChunkInfo, IndexedChunk


@dataclasses.dataclass
class _Entry:
    chunk: ChunkKV
    seq: int
    scope_digest: str
    nbytes: int
    created: float
    last_used: float


class MemoryStore:
    """A store that keeps the most recently used chunks within a limit, and forgets them with the process.

    Chunks are kept and handed out without copying: nobody may write to the tensors afterwards.

    Args:
        max_bytes: Most bytes of KV and token ids. A chunk larger than that is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._mutex = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._seq = 0

    def __repr__(self) -> str:
        return f"MemoryStore({self.max_bytes})"

    @property
    def count(self) -> int:
        """How many chunks are kept, without listing them."""
        with self._mutex:
            return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of KV and token ids that are kept, at most ``max_bytes``."""
        with self._mutex:
            return self._nbytes

    def put(self, chunk: ChunkKV) -> int:
        """See :meth:`ChunkStore.put`."""
        nbytes = chunk.nbytes + chunk.ids.nbytes
        with self._mutex:
            if chunk.key in self._entries or nbytes > self.max_bytes:
                return 0
            now = time.time()
            self._seq += 1
            self._entries[chunk.key] = _Entry(chunk, self._seq, chunk.scope.digest, nbytes, now, now)
            self._nbytes += nbytes
            while self._nbytes > self.max_bytes:
                _, evicted = self._entries.popitem(last=False)
                self._nbytes -= evicted.nbytes
        return nbytes

    def get(self, key: str) -> ChunkKV | None:
        """See :meth:`ChunkStore.get`."""
        with self._mutex:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.last_used = time.time()
            self._entries.move_to_end(key)
            return entry.chunk

    def ids(self, key: str) -> TokenIds | None:
        """See :meth:`ChunkStore.ids`."""
        with self._mutex:
            entry = self._entries.get(key)
            return None if entry is None else entry.chunk.ids

    def __contains__(self, key: object) -> bool:
        """See :meth:`ChunkStore.__contains__`."""
        with self._mutex:
            return key in self._entries

    def delete(self, key: str) -> bool:
        """See :meth:`ChunkStore.delete`."""
        with self._mutex:
            entry = self._entries.pop(key, None)
            if entry is None:
                return False
            self._nbytes -= entry.nbytes
            return True

    def entries(self) -> Iterator[ChunkInfo]:
        """See :meth:`ChunkStore.entries`."""
        with self._mutex:
            infos = [
                ChunkInfo(key, entry.chunk.scope, len(entry.chunk.ids), entry.nbytes, entry.created, entry.last_used)
                for key, entry in reversed(self._entries.items())
            ]
        return iter(infos)

    def added_since(self, scope_digest: str, cursor: int) -> tuple[int, list[IndexedChunk]]:
        """See :meth:`ChunkStore.added_since`."""
        with self._mutex:
            if cursor == self._seq:
                return cursor, []
            now = self._seq
            added = [e for e in self._entries.values() if e.seq > cursor and e.scope_digest == scope_digest]
        added.sort(key=lambda entry: entry.seq)
        return now, [IndexedChunk(e.chunk.key, sample_anchors(e.chunk.ids)) for e in added]

    def keys_since(self, scope_digest: str, cursor: int, limit: int) -> tuple[int, list[str]]:
        """See :meth:`ChunkStore.keys_since`."""
        with self._mutex:
            later = [e for e in self._entries.values() if e.seq > cursor and e.scope_digest == scope_digest]
        page = sorted(later, key=lambda entry: entry.seq)[:limit]
        return (page[-1].seq if page else cursor), [entry.chunk.key for entry in page]

    def prefetch(self, key: str) -> None:
        """See :meth:`ChunkStore.prefetch`: there is one tier."""

    def close(self) -> None:
        """Forget everything."""
        with self._mutex:
            self._entries.clear()
            self._nbytes = 0
