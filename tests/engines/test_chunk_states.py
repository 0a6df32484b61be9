"""What an engine tells of its chunks, and bringing them to memory ahead of a prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.prefetching import Prefetcher
from cacheblend_rag.store import DiskStore, MemoryStore, TieredStore, open_store

from .conftest import open_engine, random_text

CHUNKS = [random_text(seed, 120) for seed in range(40, 44)]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def engine(random_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    """A store on disk with memory before it; three chunks warm in memory and on disk."""
    with open_engine(random_models["qwen2"], store=open_store(tmp_path_factory.mktemp("states") / "kv")) as engine:
        engine.warm(CHUNKS[:3])
        yield engine


def tiers(engine: TransformersEngine) -> tuple[MemoryStore, DiskStore]:
    store = engine.library.store
    assert isinstance(store, TieredStore)
    return store.memory, store.disk


def test_is_warm_tells_what_is_stored_now(engine: TransformersEngine) -> None:
    assert engine.is_warm([CHUNKS[3], CHUNKS[0], "", CHUNKS[0]]) == [False, True, True, True]
    assert engine.is_warm([]) == []
    engine.warm([CHUNKS[3]])
    assert engine.is_warm([CHUNKS[3]]) == [True]
    engine.evict([CHUNKS[3]])
    assert engine.is_warm([CHUNKS[3]]) == [False]


def test_keys_are_those_of_this_scope(engine: TransformersEngine, random_models: dict[str, str]) -> None:
    disk = tiers(engine)[1]
    keys = engine.chunk_keys(CHUNKS)
    assert engine.stored_keys() == set(keys[:3])
    # Another tenant on the same store.
    with open_engine(random_models["qwen2"], store=DiskStore(disk.directory), namespace="other") as other:
        other.warm(CHUNKS[:1])
        foreign = other.chunk_keys(CHUNKS[:1])
        assert other.stored_keys() == set(foreign)
        assert engine.stored_keys() == set(keys[:3])
        assert engine._held([*keys, *foreign, "no key"]) == set(keys[:3])
        assert engine.evict_keys([*foreign, keys[3], "no key", keys[2]]) == 1
        assert other.is_warm(CHUNKS[:1]) == [True]
    assert engine.is_warm(CHUNKS) == [True, True, False, False]
    engine.warm(CHUNKS[:3])


def test_stored_keys_come_in_pages(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.library._KEYS_AT_ONCE", 2)
    assert engine.stored_keys() == set(engine.chunk_keys(CHUNKS[:3]))


def test_prefetch_brings_stored_chunks_to_memory(engine: TransformersEngine) -> None:
    memory = tiers(engine)[0]
    keys = engine.chunk_keys(CHUNKS)
    memory.close()
    engine.prefetch([CHUNKS[1], CHUNKS[3], "", CHUNKS[0]])
    until(lambda: keys[0] in memory and keys[1] in memory)
    assert [key in memory for key in keys] == [True, True, False, False]
    before = memory.get(keys[0])
    engine.prefetch(CHUNKS[:3])  # what is in memory isn't read again
    until(lambda: keys[2] in memory)
    assert memory.get(keys[0]) is before


def test_prefetch_returns_at_once_and_no_failure_reaches_the_caller(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory, disk = tiers(engine)
    keys = engine.chunk_keys(CHUNKS)
    memory.close()
    go, reading = threading.Event(), disk.get

    def slow(key: str) -> object:
        go.wait()
        if key == keys[0]:
            raise OSError("the disk is gone")
        return reading(key)

    monkeypatch.setattr(disk, "get", slow)
    engine.prefetch(CHUNKS[:2])  # would never return if it waited
    assert not memory._entries
    go.set()
    until(lambda: keys[1] in memory)
    assert keys[0] not in memory
    assert "the disk is gone" in caplog.text


def test_prefetch_has_nothing_to_do_with_one_tier(random_models: dict[str, str], tmp_path: Path) -> None:
    for store in (MemoryStore(1 << 30), DiskStore(tmp_path / "kv")):
        with open_engine(random_models["qwen2"], store=store) as engine:
            engine.warm(CHUNKS[:1])
            engine.prefetch(CHUNKS[:2])
            until(lambda engine=engine: not engine._prefetcher._threads)
            assert engine.is_warm(CHUNKS[:2]) == [True, False]
        engine.prefetch(CHUNKS)  # closed: nothing
        assert not engine._prefetcher._threads


def test_what_waits_is_bounded_and_dropped_on_close() -> None:
    go, taken = threading.Event(), list[str]()

    def bring(items: list[str]) -> None:
        taken.extend(items)
        go.wait()

    prefetcher = Prefetcher(bring, batch=2)
    prefetcher.add(["first"])
    until(lambda: taken == ["first"])
    prefetcher.add(str(n % 2000) for n in range(5000))
    assert len(prefetcher._waiting) == 1024
    threading.Timer(0.05, go.set).start()
    prefetcher.close()  # waits for what is under way only
    prefetcher.close()
    prefetcher.add(["late"])
    assert taken == ["first"]


def test_several_threads_bring_at_once() -> None:
    go, lock, at_once, taken = threading.Event(), threading.Lock(), [0, 0], list[str]()

    def bring(items: list[str]) -> None:
        with lock:
            taken.extend(items)
            at_once[0] += 1
            at_once[1] = max(at_once)
        go.wait()
        with lock:
            at_once[0] -= 1

    prefetcher = Prefetcher(bring, batch=1, threads=3)
    prefetcher.add(["0"])
    until(lambda: taken == ["0"])
    prefetcher.add(str(n) for n in range(1, 8))
    until(lambda: len(taken) == 3)
    go.set()
    until(lambda: not prefetcher._threads)
    assert sorted(taken) == [str(n) for n in range(8)]
    assert at_once == [0, 3]
    prefetcher.close()
