"""The warm chunks of one scope: a store, and the anchor index that finds them in prompts."""

from __future__ import annotations

import threading
from collections.abc import Collection

from cacheblend_rag.chunks import ChunkKV, ChunkScope, TokenIds
from cacheblend_rag.matching import AnchorIndex, Segment
from cacheblend_rag.store import ChunkStore

_KEYS_AT_ONCE = 10_000


class ChunkLibrary:
    """What can be reused by one model, one tenant, one primer.

    Args:
        store: Where chunks are kept; may be shared with other processes.
        scope: Which of its chunks count.
    """

    def __init__(self, store: ChunkStore, scope: ChunkScope) -> None:
        self.store = store
        self.scope = scope
        self._scope_digest = scope.digest
        self._index = AnchorIndex()
        self._cursor = 0
        self._lock = threading.Lock()

    def match(self, prompt_ids: TokenIds, exclude: Collection[str] = ()) -> list[Segment]:
        """The runs of a prompt that warm chunks cover, those stored by other processes included.

        Args:
            prompt_ids: int32 ``[tokens]``.
            exclude: Keys of chunks to treat as not there.
        """
        with self._lock:
            self._cursor, added = self.store.added_since(self._scope_digest, self._cursor)
            self._index.add(added)
            return self._index.match(prompt_ids, self.store.ids, exclude)

    def read(self, key: str) -> ChunkKV | None:
        """A matched chunk, or None if it can't be had: the store has said why."""
        return self.store.get(key)

    def is_warm(self, chunk_ids: TokenIds) -> bool:
        """Whether the chunk is stored."""
        return self.scope.key(chunk_ids) in self.store

    def holds(self, key: str) -> bool:
        """Whether a chunk of this scope is stored under a key."""
        return key in self.store and self._owns(key)

    def keys_since(self, cursor: int) -> tuple[int, list[str]]:
        """Some of the scope's keys, see :meth:`ChunkStore.keys_since`."""
        return self.store.keys_since(self._scope_digest, cursor, _KEYS_AT_ONCE)

    def evict(self, chunk_ids: TokenIds) -> bool:
        """Remove a chunk; False if it wasn't stored."""
        return self._remove(self.scope.key(chunk_ids))

    def evict_key(self, key: str) -> bool:
        """Remove the chunk of this scope that is stored under a key; False if there is none."""
        return self._owns(key) and self._remove(key)

    def _owns(self, key: str) -> bool:
        # A key may come from anybody, and be that of another tenant's chunk.
        ids = self.store.ids(key)
        return ids is not None and self.scope.key(ids) == key

    def _remove(self, key: str) -> bool:
        with self._lock:
            self._index.discard(key)
        return self.store.delete(key)
