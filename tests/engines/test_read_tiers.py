"""What the stats tell of where chunk KV was read from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.store import ChunkStore, open_store

from .conftest import open_engine, random_text

CHUNKS = [random_text(seed, 200) for seed in range(4)]
PROMPT = "Read this.\n" + "\n\n".join(CHUNKS) + "\n\nWhat is it about?"


@pytest.fixture(scope="module")
def loaded(random_models: dict[str, str]) -> Iterator[TransformersEngine]:
    """A model, for engines of other stores."""
    with open_engine(random_models["qwen2"]) as engine:
        yield engine


@pytest.fixture(scope="module")
def directory(loaded: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all chunks."""
    found = tmp_path_factory.mktemp("kv")
    store = open_store(found)
    loaded.beside(store).warm(CHUNKS)
    store.close()
    return found


def sizes(engine: TransformersEngine) -> list[int]:
    """Bytes of KV of each chunk."""
    chunks = [engine.library.read(key) for key in engine.chunk_keys(CHUNKS)]
    return [chunk.nbytes for chunk in chunks if chunk is not None]


@pytest.fixture
def engines(loaded: TransformersEngine, directory: Path) -> Iterator[Any]:
    """Opens engines with so much memory in front of that store; their stores are closed after the test."""
    stores: list[ChunkStore] = []

    def open_(memory_bytes: int) -> TransformersEngine:
        stores.append(open_store(directory, memory_bytes=memory_bytes))
        return loaded.beside(stores[-1])

    yield open_
    for store in stores:
        store.close()


def test_all_from_disk_then_all_from_memory(engines: Any) -> None:
    engine = engines(1 << 30)
    first = engine.generate(PROMPT, max_tokens=1).stats
    then = engine.generate(PROMPT, max_tokens=1).stats
    plain = engine.generate(PROMPT, max_tokens=1, blend={"mode": "off"}).stats
    everything = sum(sizes(engine))
    assert first.read_bytes == {"disk": everything}
    assert then.read_bytes == {"memory": everything}
    assert plain.read_bytes == plain.read_seconds == {}
    for stats in (first, then):
        assert stats.read_seconds.keys() == stats.read_bytes.keys()
        assert 0 < sum(stats.read_seconds.values()) < stats.load


def test_a_memory_that_holds_one_chunk(engines: Any) -> None:
    each = sizes(engines(0))
    engine = engines(int(1.5 * max(each)))
    one_by_one = [engine.generate(f"Read this: {text} And?", max_tokens=1).stats for text in (*CHUNKS[:2], CHUNKS[1])]
    assert [stats.read_bytes for stats in one_by_one] == [{"disk": each[0]}, {"disk": each[1]}, {"memory": each[1]}]
    # The others push out what is in memory before its turn comes, as an LRU does with what is read in a circle.
    last_in = engine.generate(PROMPT, max_tokens=1).stats
    assert last_in.read_bytes == {"disk": sum(each)}
    reverse = "Read this.\n" + "\n\n".join(CHUNKS[::-1]) + "\n\nWhat is it about?"
    assert engine.generate(reverse, max_tokens=1).stats.read_bytes == {"memory": each[3], "disk": sum(each[:3])}


def test_without_memory_all_is_from_disk_always(engines: Any) -> None:
    engine = engines(0)
    found = [engine.generate(PROMPT, max_tokens=1).stats.read_bytes for _ in range(2)]
    assert found == [{"disk": sum(sizes(engine))}] * 2


def test_what_was_prefetched_was_read_from_disk(engines: Any) -> None:
    engine = engines(1 << 30)
    engine.prefetch(CHUNKS[:2])
    deadline = time.monotonic() + 60
    while engine._prefetcher._threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(key in engine.library.store.memory for key in engine.chunk_keys(CHUNKS[:2]))
    found = [engine.generate(f"Read this: {CHUNKS[0]} And?", max_tokens=1).stats for _ in range(2)]
    each = sizes(engine)
    assert [stats.read_bytes for stats in found] == [{"disk": each[0]}, {"memory": each[0]}]
    assert found[0].read_seconds["disk"] > 0


def test_a_chunk_that_can_not_be_read_is_not_counted(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines(1 << 30)
    lost, *_ = engine.chunk_keys(CHUNKS)
    get = engine.library.store.disk.get
    monkeypatch.setattr(engine.library.store.disk, "get", lambda key: None if key == lost else get(key))
    stats = engine.generate(PROMPT, max_tokens=1).stats
    monkeypatch.undo()
    rest = sum(sizes(engine)[1:])
    assert stats.faults == 1
    # The others are read once more when the prompt has been matched again without it.
    assert stats.read_bytes == {"disk": rest, "memory": rest}
