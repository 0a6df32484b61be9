"""Opening a store by name, and the memory in front of the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_chunks import make_chunk, same

from cacheblend_rag.errors import ConfigError, StoreError
from cacheblend_rag.store import DiskStore, MemoryStore, TieredStore, open_store


def test_nothing_named_is_memory():
    store = open_store(None, memory_bytes=100_000)
    assert isinstance(store, MemoryStore)
    chunk = make_chunk(0)
    assert store.put(chunk) == chunk.nbytes + chunk.ids.nbytes
    assert same(store.get(chunk.key), chunk)
    store.close()
    store.close()


@pytest.mark.parametrize("form", [str, Path, lambda path: path.as_uri(), lambda path: f"file://localhost{path}"])
def test_a_directory_is_a_disk_behind_memory(tmp_path: Path, form):
    directory = tmp_path / "a store"
    if isinstance(form(directory), str):
        target = form(directory).replace(" ", "%20") if "://" in form(directory) else form(directory)
    else:
        target = form(directory)
    store = open_store(target)
    assert isinstance(store, TieredStore)
    store.put(make_chunk(0))
    store.close()
    assert (directory / "chunks").is_dir()
    assert isinstance(open_store(target, memory_bytes=0), DiskStore)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/store").close()
    assert (tmp_path / "store" / "chunks").is_dir()


@pytest.mark.parametrize(
    "target", ["s3://bucket/x", "redis://localhost", "https://example.org", "file://elsewhere/x", "file://", ""]
)
def test_other_targets_are_refused(target: str):
    with pytest.raises(ConfigError, match="director"):
        open_store(target)


@pytest.mark.parametrize("limits", [{"memory_bytes": -1}, {"max_bytes": 0}, {"max_bytes": -5}])
def test_limits_are_checked(tmp_path: Path, limits: dict[str, int]):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        open_store(tmp_path, **limits)


def test_a_file_in_the_way(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        open_store(tmp_path / "file")


def test_what_is_read_from_disk_is_kept_in_memory(tmp_path: Path):
    chunk = make_chunk(0)
    store = open_store(tmp_path)
    store.put(chunk)
    assert store.get(chunk.key) is chunk
    store.close()
    store = open_store(tmp_path)
    read = store.get(chunk.key)
    assert same(read, chunk)
    assert store.get(chunk.key) is read
    assert store.faults == 0
    store.close()


def test_what_memory_holds_is_not_what_is_stored(tmp_path: Path):
    """The disk decides what there is: a chunk deleted there can be stored again, and is reported as gone."""
    chunk = make_chunk(0)
    store = open_store(tmp_path)
    store.put(chunk)
    store.disk.remove()
    assert chunk.key not in store
    assert store.ids(chunk.key) is None
    assert store.put(chunk) > 0
    assert chunk.key in store
    store.close()


def test_reading_from_memory_keeps_a_chunk_on_the_disk(tmp_path: Path):
    chunks = [make_chunk(n) for n in range(4)]
    size = DiskStore(tmp_path).put(chunks[0])
    store = open_store(tmp_path, max_bytes=3 * size)
    for chunk in chunks[1:3]:
        store.put(chunk)
    store.get(chunks[0].key)
    for _ in range(3):
        store.get(chunks[0].key)  # from memory
        store.get(chunks[1].key)
    store.put(chunks[3])
    assert [chunk.key in store for chunk in chunks] == [True, True, False, True]
    store.close()


def test_a_damaged_file_behind_memory_is_counted(tmp_path: Path):
    chunk = make_chunk(0)
    store = open_store(tmp_path, memory_bytes=1)
    store.put(chunk)
    (path,) = tmp_path.glob("chunks/*/*")
    path.write_bytes(b"")
    assert store.get(chunk.key) is None
    assert store.faults == 1
    store.close()
