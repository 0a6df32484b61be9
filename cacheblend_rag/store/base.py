"""What a chunk store must do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from cacheblend_rag.anchors import Anchors
from cacheblend_rag.chunks import ChunkKV, ChunkScope, TokenIds


@dataclasses.dataclass(frozen=True)
class ChunkInfo:
    """One stored chunk, without its KV.

    Attributes:
        key: The chunk's key.
        scope: Namespace, model and primer it belongs to.
        tokens: Its length in tokens.
        nbytes: Bytes it takes in the store.
        created: Unix time it was stored, in seconds.
        last_used: Unix time it was last read or stored, in seconds.
    """

    key: str
    scope: ChunkScope
    tokens: int
    nbytes: int
    created: float
    last_used: float


@dataclasses.dataclass(frozen=True)
class IndexedChunk:
    """What the anchor index needs to know of a chunk.

    Attributes:
        key: The chunk's key.
        anchors: Its sampled k-grams.
    """

    key: str
    anchors: Anchors


class ChunkStore(Protocol):
    """Keeps chunks by key. Safe to use from several threads; a disk store also from several processes.

    A chunk that is missing, damaged or unreadable is ``None`` from :meth:`get` with a logged warning, never an error:
    whoever asks prefills it instead.
    """

    def put(self, chunk: ChunkKV) -> int:
        """Store a chunk; one already there is left as it is. Returns the bytes written (0 if it was there).

        Raises:
            StoreError: the store can't be written (full disk, permissions); nothing stored is lost.
        """

    def get(self, key: str) -> ChunkKV | None:
        """The chunk, verified against its checksum, or None. Counts as a use for LRU eviction."""

    def ids(self, key: str) -> TokenIds | None:
        """The chunk's token ids (int32 ``[tokens]``) or None; cheap, touches no KV."""

    def __contains__(self, key: object) -> bool:
        """Whether :meth:`get` would probably find it."""

    def delete(self, key: str) -> bool:
        """Remove a chunk; False if it wasn't there."""

    def entries(self) -> Iterator[ChunkInfo]:
        """All chunks, most recently used first."""

    def added_since(self, scope_digest: str, cursor: int) -> tuple[int, list[IndexedChunk]]:
        """Chunks of a scope stored after ``cursor`` (0: all), by any process, and the cursor to ask with next time."""

    def keys_since(self, scope_digest: str, cursor: int, limit: int) -> tuple[int, list[str]]:
        """Keys of a scope stored after ``cursor`` (0: all), at most ``limit``, and the cursor to go on with.

        None are left when the list is empty. A chunk that was stored anew meanwhile may come twice.
        """

    def prefetch(self, key: str) -> None:
        """Bring a chunk to the fastest tier, where there are several. One that is there, or isn't stored, is left."""

    def close(self) -> None:
        """Release files and connections; closing twice does nothing."""
