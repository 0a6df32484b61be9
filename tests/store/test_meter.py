"""Which tier chunks come from, and what reading them takes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from store_chunks import make_chunk, same

from cacheblend_rag.store import MemoryStore, TieredStore, open_store
from cacheblend_rag.store.meter import ReadMeter

CHUNKS = [make_chunk(n) for n in range(4)]
ROOM = CHUNKS[0].nbytes + CHUNKS[0].ids.nbytes  # of each of them: they are of one length


def read(meter: ReadMeter, n: int) -> str | None:
    """Where a chunk came from."""
    found = meter.read(CHUNKS[n].key)
    if found is None:
        return None
    assert same(found.chunk, CHUNKS[n])
    assert found.seconds > 0
    return found.tier


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A store of all chunks but the last, with nothing in memory."""
    store = open_store(tmp_path)
    for chunk in CHUNKS[:3]:
        store.put(chunk)
    store.close()
    return tmp_path


def test_a_memory_that_holds_two(directory: Path) -> None:
    store = open_store(directory, memory_bytes=2 * ROOM)
    meter = ReadMeter(store)
    assert [read(meter, n) for n in (0, 1, 0, 1, 2, 1, 0, 3)] == [
        "disk", "disk", "memory", "memory", "disk", "memory", "disk", None,
    ]  # fmt: skip
    store.close()


def test_one_tier(directory: Path) -> None:
    disk = open_store(directory, memory_bytes=0)
    assert [read(ReadMeter(disk), n) for n in (0, 0, 3)] == ["disk", "disk", None]
    disk.close()
    memory = MemoryStore(1 << 20)
    memory.put(CHUNKS[0])
    assert [read(ReadMeter(memory), n) for n in (0, 0, 3)] == ["memory", "memory", None]


def test_what_is_brought_ahead_counts_once(directory: Path) -> None:
    store = open_store(directory)
    meter = ReadMeter(store)
    for n in (0, 0, 3):
        meter.bring(CHUNKS[n].key, store.prefetch)
    assert CHUNKS[0].key in store.memory
    assert [read(meter, n) for n in (0, 0)] == ["disk", "memory"]
    meter.bring(CHUNKS[0].key, store.prefetch)  # it is there
    assert read(meter, 0) == "memory"
    store.close()


def test_what_was_brought_and_dropped_again_is_read_again(directory: Path) -> None:
    store = open_store(directory, memory_bytes=ROOM)
    meter = ReadMeter(store)
    for n in (0, 1):
        meter.bring(CHUNKS[n].key, store.get)
    assert [read(meter, n) for n in (0, 0)] == ["disk", "memory"]
    store.close()


def test_no_more_is_remembered_than_it_may(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.store.meter._MOST_AHEAD", 2)
    store = open_store(directory)
    meter = ReadMeter(store)
    for n in range(3):
        meter.bring(CHUNKS[n].key, store.get)
    assert [read(meter, n) for n in range(3)] == ["memory", "disk", "disk"]
    store.close()


def test_reads_that_overlap_share_their_time(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(directory)
    assert isinstance(store, TieredStore)
    get = store.disk.get

    def slow(key: str) -> Any:
        time.sleep(0.1)
        return get(key)

    monkeypatch.setattr(store.disk, "get", slow)
    meter = ReadMeter(store)
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(meter.bring, CHUNKS[0].key, store.prefetch)
        found = [pool.submit(meter.read, CHUNKS[n].key) for n in (1, 2)]
        ahead.result()
    reads = [meter.read(CHUNKS[0].key), *(one.result() for one in found)]
    elapsed = time.perf_counter() - started
    assert all(one is not None and one.tier == "disk" for one in reads)
    seconds = sum(one.seconds for one in reads if one is not None)
    assert 0.2 <= seconds <= elapsed  # two threads: 0.3 s of reading in 0.2 s
    assert seconds < 0.29
    store.close()


def test_a_read_that_fails_leaves_nothing_behind(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(directory)
    meter = ReadMeter(store)

    def fail(key: str) -> None:
        raise OSError("the disk is gone")

    for call in (lambda: meter.bring(CHUNKS[0].key, fail), lambda: meter.bring(CHUNKS[0].key, fail)):
        with pytest.raises(OSError, match="gone"):
            call()
    assert meter.clock.take() == (0, 0.0)
    assert read(meter, 0) == "disk"
    tokens, seconds = meter.clock.take()
    assert tokens == len(CHUNKS[0].ids)
    assert seconds > 0
    store.close()
