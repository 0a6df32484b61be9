"""Which tier the chunks of prompts come from, and what reading them takes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.stats import Tier
from cacheblend_rag.store.base import ChunkStore
from cacheblend_rag.store.memory import MemoryStore
from cacheblend_rag.store.tiered import TieredStore

_MOST_AHEAD = 4096  # chunks; far more than are brought for the prompts that wait


class ReadClock:
    """Times reads by several threads, which together are busy for less than the sum of their times."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._since = 0.0
        self._tokens = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """A thread begins to read a chunk."""
        with self._lock:
            if not self._readers:
                self._since = time.perf_counter()
            self._readers += 1

    def end(self, tokens: int) -> float:
        """It has read so many tokens; none, if it failed.

        Returns:
            Seconds that somebody was reading since the last chunk ended: those of all chunks sum to the time in which
            anything was read.
        """
        with self._lock:
            now = time.perf_counter()
            seconds = now - self._since
            self._seconds += seconds
            self._since = now
            self._tokens += tokens
            self._readers -= 1
            return seconds

    def take(self) -> tuple[int, float]:
        """Tokens read since this was last called, and seconds that somebody was reading; (0, 0.0) if none were."""
        with self._lock:
            if not self._tokens:
                return 0, 0.0
            taken = self._tokens, self._seconds
            self._tokens, self._seconds = 0, 0.0
            return taken


@dataclasses.dataclass(frozen=True)
class ChunkRead:
    """A chunk that a prompt uses, and how it was read.

    Attributes:
        chunk: What was read.
        tier: Where it was.
        seconds: What reading it took, see :class:`ReadMeter`.
    """

    chunk: ChunkKV
    tier: Tier
    seconds: float


class ReadMeter:
    """Reads chunks of a store for prompts. Threads may share it.

    A chunk that was brought to memory ahead of its prompt counts as read from disk for the first prompt that uses it,
    with what bringing it took. Reads from disk that overlap share their time, see :meth:`ReadClock.end`. One that comes
    to memory, or leaves it, at the very moment when it is asked for counts as where it was before.

    Args:
        store: Where the chunks are.

    Attributes:
        clock: Times the reads from disk.
    """

    def __init__(self, store: ChunkStore) -> None:
        self.clock = ReadClock()
        self._store = store
        self._lock = threading.Lock()
        self._ahead: OrderedDict[str, float] = OrderedDict()  # seconds by key; brought longest ago first

    def read(self, key: str) -> ChunkRead | None:
        """A chunk that a prompt uses; None if it can't be had: the store has said why."""
        with self._lock:
            ahead = self._ahead.pop(key, None)
        if self._is_on_disk(key):
            chunk, seconds = self._from_disk(key, self._store.get)
            return None if chunk is None else ChunkRead(chunk, "disk", seconds)
        started = time.perf_counter()
        chunk = self._store.get(key)
        seconds = time.perf_counter() - started
        if chunk is None:
            return None
        return ChunkRead(chunk, "memory", seconds) if ahead is None else ChunkRead(chunk, "disk", ahead + seconds)

    def bring(self, key: str, fetch: Callable[[str], ChunkKV | None]) -> ChunkKV | None:
        """Have a chunk brought to memory for a prompt that is still to come.

        Args:
            key: The chunk's.
            fetch: Does it. What it returns is returned.
        """
        if not self._is_on_disk(key):
            return fetch(key)
        chunk, seconds = self._from_disk(key, fetch)
        if not self._is_on_disk(key):
            with self._lock:
                self._ahead[key] = seconds
                if len(self._ahead) > _MOST_AHEAD:
                    self._ahead.popitem(last=False)
        return chunk

    def _is_on_disk(self, key: str) -> bool:
        """Whether it would be read from there, if at all."""
        if isinstance(self._store, TieredStore):
            return key not in self._store.memory
        return not isinstance(self._store, MemoryStore)

    def _from_disk(self, key: str, fetch: Callable[[str], ChunkKV | None]) -> tuple[ChunkKV | None, float]:
        chunk, seconds = None, 0.0
        self.clock.begin()
        try:
            chunk = fetch(key)
        finally:
            seconds = self.clock.end(0 if chunk is None else len(chunk.ids))
        return chunk, seconds
