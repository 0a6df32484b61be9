"""Every store against a dictionary: any sequence of calls, eviction and reopening included."""

from __future__ import annotations

import shutil
import tempfile
from typing import ClassVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_chunks import make_chunk, same

from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.store import ChunkStore, DiskStore, MemoryStore, TieredStore
from cacheblend_rag.store.chunkfile import pack

CHUNKS = [make_chunk(seed, tokens=tokens) for seed, tokens in enumerate([16, 25, 34, 43, 52, 61, 200])]
LIMIT = 9_000  # bytes: room for two to four, none for the last
numbers = st.integers(0, len(CHUNKS) - 1)


class MemoryMachine(RuleBasedStateMachine):
    """The model is a dictionary in order of use: least recently used first."""

    limit: ClassVar[int | None] = LIMIT
    durable: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp()
        self.store = self.open()
        self.order: list[int] = []
        self.written: list[int] = []  # the order a crash would leave
        self.cursor = 0
        self.added: dict[int, None] = {}

    def open(self) -> ChunkStore:
        return MemoryStore(LIMIT)

    def nbytes(self, chunk: ChunkKV) -> int:
        return chunk.nbytes + chunk.ids.nbytes

    @rule(n=numbers)
    def put(self, n: int) -> None:
        size = self.nbytes(CHUNKS[n])
        new = n not in self.order and (self.limit is None or size <= self.limit)
        assert self.store.put(CHUNKS[n]) == (size if new else 0)
        if new:
            self.order.append(n)
            self.added.pop(n, None)
            self.added[n] = None
            while self.limit is not None and sum(self.nbytes(CHUNKS[m]) for m in self.order) > self.limit:
                self.order.pop(0)
            self.written = list(self.order)

    @rule(n=numbers)
    def get(self, n: int) -> None:
        found = self.store.get(CHUNKS[n].key)
        assert same(found, CHUNKS[n] if n in self.order else None)
        if n in self.order:
            self.order.remove(n)
            self.order.append(n)

    @rule(n=numbers)
    def delete(self, n: int) -> None:
        assert self.store.delete(CHUNKS[n].key) == (n in self.order)
        if n in self.order:
            self.order.remove(n)
            self.written.remove(n)

    @rule(n=numbers)
    def look_up(self, n: int) -> None:
        key = CHUNKS[n].key
        assert (key in self.store) == (n in self.order)
        ids = self.store.ids(key)
        assert np.array_equal(ids, CHUNKS[n].ids) if n in self.order else ids is None

    @rule()
    def list_entries(self) -> None:
        infos = list(self.store.entries())
        assert [info.key for info in infos] == [CHUNKS[n].key for n in reversed(self.order)]
        assert [info.nbytes for info in infos] == [self.nbytes(CHUNKS[n]) for n in reversed(self.order)]
        self.written = list(self.order)

    @rule()
    def follow(self) -> None:
        self.cursor, added = self.store.added_since(CHUNKS[0].scope.digest, self.cursor)
        assert [chunk.key for chunk in added] == [CHUNKS[n].key for n in self.added if n in self.order]
        self.added = {}

    @rule(limit=st.integers(1, 3))
    def list_keys(self, limit: int) -> None:
        digest, found = CHUNKS[0].scope.digest, []
        cursor, page = self.store.keys_since(digest, 0, limit)
        while page:
            assert len(page) <= limit
            found += page
            cursor, page = self.store.keys_since(digest, cursor, limit)
        assert sorted(found) == sorted(CHUNKS[n].key for n in self.order)
        assert self.store.keys_since("another", 0, limit) == (0, [])

    @precondition(lambda self: self.durable)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()
        self.written = list(self.order)

    @precondition(lambda self: self.durable)
    @rule()
    def reopen_after_a_crash(self) -> None:
        """Nothing was closed: uses that were not written down are forgotten, chunks are not."""
        self.store = self.open()
        self.order = list(self.written)

    @invariant()
    def nothing_else_is_there(self) -> None:
        if self.durable:
            assert self.store.faults == 0

    @invariant()
    def what_memory_holds_is_counted(self) -> None:
        if isinstance(self.store, MemoryStore):
            assert self.store.count == len(self.order)
            assert self.store.nbytes == sum(self.nbytes(CHUNKS[n]) for n in self.order)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)


class DiskMachine(MemoryMachine):
    durable = True

    def open(self) -> ChunkStore:
        return DiskStore(self.directory, self.limit)

    def nbytes(self, chunk: ChunkKV) -> int:
        return sum(len(piece) for piece in pack(chunk))


class UnlimitedDiskMachine(DiskMachine):
    limit = None


class TieredMachine(DiskMachine):
    def open(self) -> ChunkStore:
        return TieredStore(MemoryStore(LIMIT // 2), DiskStore(self.directory, self.limit))


few = settings(max_examples=15, stateful_step_count=40, deadline=None)
MemoryMachine.TestCase.settings = settings(max_examples=50, deadline=None)
DiskMachine.TestCase.settings = few
UnlimitedDiskMachine.TestCase.settings = few
TieredMachine.TestCase.settings = few
TestMemory = MemoryMachine.TestCase
TestDisk = DiskMachine.TestCase
TestUnlimitedDisk = UnlimitedDiskMachine.TestCase
TestTiered = TieredMachine.TestCase
