"""The disk store as one user sees it: what survives reopening, what is evicted, removed, verified and repaired."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from store_chunks import SCOPE, make_chunk, same

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import DiskStore

OpenDisk = Callable[..., DiskStore]


def file_of(store: DiskStore, key: str) -> Path:
    (path,) = store.directory.glob(f"chunks/*/{key}.safetensors")
    return path


def states(store: DiskStore, **options: bool) -> dict[str, str]:
    return {check.key: check.state for check in store.verify(**options)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunks_survive_reopening(open_disk: OpenDisk, dtype: torch.dtype):
    chunks = [make_chunk(n, dtype=dtype) for n in range(5)]
    store = open_disk()
    sizes = [store.put(chunk) for chunk in chunks]
    store.close()
    store.close()
    store = open_disk()
    assert all(same(store.get(chunk.key), chunk) for chunk in chunks)
    assert sizes == [file_of(store, chunk.key).stat().st_size for chunk in chunks]
    assert {info.key: (info.scope, info.tokens) for info in store.entries()} == {c.key: (SCOPE, 40) for c in chunks}
    assert all(time.time() - 60 < info.created <= info.last_used <= time.time() for info in store.entries())


def test_a_closed_store_says_so(open_disk: OpenDisk):
    store = open_disk()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.put(make_chunk(0))


def test_nobody_else_may_read_it(tmp_path: Path):
    umask = os.umask(0)
    try:
        store = DiskStore(tmp_path / "a" / "store")
        store.put(make_chunk(0))
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o777)
        inside = DiskStore(shared)
        inside.put(make_chunk(0))
    finally:
        os.umask(umask)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    for directory in (store.directory, shared):
        for path in directory.rglob("*"):
            assert not path.stat().st_mode & 0o077, path
    store.close()
    inside.close()


def test_uses_survive_reopening_and_decide_who_goes(open_disk: OpenDisk):
    chunks = [make_chunk(n) for n in range(4)]
    store = open_disk()
    (size,) = {store.put(chunk) for chunk in chunks}
    store.get(chunks[1].key)
    store.touch(chunks[0].key)
    store.close()
    store = open_disk(4 * size)
    order = [2, 3, 1, 0]
    assert [info.key for info in store.entries()] == [chunks[n].key for n in reversed(order)]
    for seed, gone in zip(range(10, 14), order, strict=True):
        new = make_chunk(seed)
        store.put(new)
        assert chunks[gone].key not in store
        assert store.get(chunks[gone].key) is None
        assert new.key in store
    assert len(list(store.directory.glob("chunks/*/*"))) == 4


def test_uses_are_written_in_time(open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch):
    """A process that only reads, and never closes the store, still counts."""
    chunks = [make_chunk(n) for n in range(2)]
    reader = open_disk()
    for chunk in chunks:
        reader.put(chunk)
    other = open_disk()
    reader.get(chunks[0].key)
    assert next(other.entries()).key == chunks[1].key
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    reader.get(chunks[0].key)
    assert next(other.entries()).key == chunks[0].key


def test_the_latest_use_counts_not_the_latest_written(open_disk: OpenDisk):
    x, y = make_chunk(0), make_chunk(1)
    a, b = open_disk(), open_disk()
    a.put(x)
    a.put(y)
    a.touch(x.key)
    b.touch(y.key)
    b.touch(x.key)
    assert [info.key for info in b.entries()] == [x.key, y.key]
    assert [info.key for info in a.entries()] == [x.key, y.key]


def test_a_chunk_larger_than_the_store_is_not_kept(open_disk: OpenDisk, caplog: pytest.LogCaptureFixture):
    small, large = make_chunk(0), make_chunk(1, tokens=400)
    store = open_disk(10_000)
    store.put(small)
    assert store.put(large) == 0
    assert large.key not in store
    assert same(store.get(small.key), small)
    assert "larger" in caplog.text


@pytest.mark.parametrize(
    "key", ["", "x", "../../../etc/passwd", "0" * 31, "0" * 33, "G" * 32, "0" * 32 + "\n", "\0", 7]
)
def test_what_is_no_key_is_a_miss(open_disk: OpenDisk, key: str):
    store = open_disk()
    assert key not in store
    if isinstance(key, str):
        assert store.get(key) is None
        assert store.ids(key) is None
        assert not store.delete(key)
    assert store.faults == 0


def test_remove(open_disk: OpenDisk):
    theirs = dataclasses.replace(SCOPE, namespace="theirs")
    mine = [make_chunk(n) for n in range(20)]
    others = [make_chunk(n, scope=theirs) for n in range(20)]
    store = open_disk()
    for chunk in mine + others:
        store.put(chunk)
    prefix = mine[0].key[:1]
    hits = [chunk for chunk in mine if chunk.key.startswith(prefix)]
    assert store.remove(prefix=prefix, namespace="default") == len(hits)
    assert {info.key for info in store.entries()} == {c.key for c in mine + others} - {c.key for c in hits}
    assert store.remove(namespace="nobody") == 0
    assert store.remove(namespace="theirs") == 20
    assert {info.key for info in store.entries()} == {c.key for c in mine} - {c.key for c in hits}
    assert store.remove() == 20 - len(hits)
    assert list(store.entries()) == []
    assert list(store.directory.glob("chunks/*/*")) == []


def test_scopes_don_t_meet(open_disk: OpenDisk):
    other = dataclasses.replace(SCOPE, primer_ids=(1, 5))
    store = open_disk()
    a, b = make_chunk(0), make_chunk(0, scope=other)
    store.put(a)
    store.put(b)
    assert a.key != b.key
    assert [c.key for c in store.added_since(SCOPE.digest, 0)[1]] == [a.key]
    assert [c.key for c in store.added_since(other.digest, 0)[1]] == [b.key]
    assert store.get(b.key).scope == other


def test_a_chunk_stored_again_is_reported_again(open_disk: OpenDisk):
    store = open_disk()
    chunk = make_chunk(0)
    store.put(chunk)
    cursor, added = store.added_since(SCOPE.digest, 0)
    assert [c.key for c in added] == [chunk.key]
    assert store.added_since(SCOPE.digest, cursor) == (cursor, [])
    store.delete(chunk.key)
    store.put(chunk)
    later, added = store.added_since(SCOPE.digest, cursor)
    assert later > cursor
    assert [c.key for c in added] == [chunk.key]


def test_verify_finds_and_repairs(open_disk: OpenDisk):
    chunks = [make_chunk(n) for n in range(6)]
    store = open_disk()
    for chunk in chunks:
        store.put(chunk)
    ok, corrupt, missing, orphan, foreign, misplaced = (chunk.key for chunk in chunks)
    paths = {chunk.key: file_of(store, chunk.key) for chunk in chunks}
    paths[corrupt].write_bytes(paths[corrupt].read_bytes()[:-1])
    paths[missing].unlink()
    body = paths[orphan].read_bytes()
    store.delete(orphan)
    paths[orphan].write_bytes(body)
    shutil.copy(paths[ok], paths[foreign])
    elsewhere = store.directory / "chunks" / "zz"
    elsewhere.mkdir()
    shutil.copy(paths[misplaced], elsewhere)
    (elsewhere / "notes.txt").write_text("hello")
    old, new = store.directory / "tmp" / "old", store.directory / "tmp" / "new"
    for temp in (old, new):
        temp.write_bytes(b"half a chunk")
    os.utime(old, (0, 0))

    found = [(check.key, check.state) for check in store.verify()]
    expected = [
        (ok, "ok"),
        (corrupt, "corrupt"),
        (missing, "missing"),
        (orphan, "orphan"),
        (foreign, "corrupt"),
        (misplaced, "ok"),
        (misplaced, "corrupt"),
        ("notes", "corrupt"),
    ]
    assert sorted(found) == sorted(expected)
    assert [check.cause for check in store.verify() if check.key == ok] == [""]
    assert all(check.cause for check in store.verify() if check.state != "ok")
    assert not old.exists()
    assert new.exists()

    assert sorted((check.key, check.state) for check in store.verify(repair=True)) == sorted(expected)
    assert states(store) == {ok: "ok", orphan: "ok", misplaced: "ok"}
    assert same(store.get(orphan), chunks[3])
    assert [c.key for c in store.added_since(SCOPE.digest, 0)[1]] == [ok, misplaced, orphan]
    assert len(list((store.directory / "quarantine").iterdir())) == 4
    assert store.faults == 0
    for chunk in chunks:
        store.put(chunk)
    assert states(store) == {chunk.key: "ok" for chunk in chunks}


def test_a_stored_file_the_manifest_forgot_is_listed_by_put(open_disk: OpenDisk):
    store = open_disk()
    chunk = make_chunk(0)
    store.put(chunk)
    body = file_of(store, chunk.key).read_bytes()
    path = file_of(store, chunk.key)
    store.delete(chunk.key)
    path.write_bytes(body)
    assert chunk.key not in store
    assert store.put(chunk) > 0
    assert [c.key for c in store.added_since(SCOPE.digest, 0)[1]] == [chunk.key]


def test_a_directory_that_holds_other_things_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match=r"thesis\.tex"):
        DiskStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_fresh_volume_is_empty_enough(tmp_path: Path):
    (tmp_path / "lost+found").mkdir()
    DiskStore(tmp_path).close()


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/deep"])
def test_an_impossible_directory_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as caught:
        DiskStore(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_directory_is_refused(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        for directory in (tmp_path, tmp_path / "below"):
            with pytest.raises(StoreError, match="may write"):
                DiskStore(directory)
    finally:
        tmp_path.chmod(0o700)


class TestManifest:
    """A manifest can always be made again from the chunk files."""

    @pytest.fixture
    def chunks(self):
        return [make_chunk(n) for n in range(8)]

    @staticmethod
    def manifest(store: DiskStore) -> Path:
        (path,) = store.directory.glob("manifest-*.sqlite")
        return path

    def damage(self, path: Path, how: str) -> None:
        if how == "deleted":
            path.unlink()
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "noise":
            path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
        elif how == "half":
            os.truncate(path, path.stat().st_size // 2)
        else:
            data = bytearray(path.read_bytes())
            data[4096:] = np.random.default_rng(1).bytes(len(data) - 4096)  # all pages but the first
            path.write_bytes(data)

    DAMAGES = ("deleted", "empty", "noise", "half", "pages")

    @pytest.mark.parametrize("how", DAMAGES)
    def test_a_damaged_manifest_is_rebuilt(self, open_disk: OpenDisk, chunks, how, caplog):
        store = open_disk()
        for chunk in chunks:
            store.put(chunk)
        cursor, _ = store.added_since(SCOPE.digest, 0)
        store.close()
        self.damage(self.manifest(store), how)
        caplog.set_level(logging.WARNING)
        store = open_disk()
        later, added = store.added_since(SCOPE.digest, cursor)
        assert later > cursor
        assert {c.key for c in added} == {chunk.key for chunk in chunks}
        assert all(np.array_equal(store.ids(chunk.key), chunk.ids) for chunk in chunks)
        assert states(store) == {chunk.key: "ok" for chunk in chunks}
        assert len([r for r in caplog.records if "anew" in r.message]) == (how != "deleted")
        aside = list((store.directory / "quarantine").glob("manifest-*.sqlite"))
        assert len(aside) == (how != "deleted")
        store.put(make_chunk(20))
        assert len(store.added_since(SCOPE.digest, later)[1]) == 1

    @pytest.mark.parametrize("how", DAMAGES)
    def test_damage_while_others_have_it_open(self, open_disk: OpenDisk, chunks, how):
        a, b = open_disk(), open_disk()
        for chunk in chunks:
            a.put(chunk)
        cursor, _ = b.added_since(SCOPE.digest, 0)
        self.damage(self.manifest(a), how)
        c = open_disk()
        new = [make_chunk(seed) for seed in range(30, 33)]
        for store, chunk in zip((a, b, c), new, strict=True):
            store.put(chunk)
        everything = {chunk.key for chunk in chunks + new}
        for store in (a, b, c):
            assert {info.key for info in store.entries()} == everything
            assert {check.state for check in store.verify()} == {"ok"}
            assert store.faults == 0
        assert {chunk.key for chunk in new} <= {c.key for c in b.added_since(SCOPE.digest, cursor)[1]}
        a.close()
        b.close()
        c.close()
        assert {info.key for info in open_disk().entries()} == everything

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE chunks SET ids = zeroblob(160)",
            "UPDATE chunks SET ids = x'00'",
            "UPDATE chunks SET ids = 'text'",
            "UPDATE chunks SET scope = 'another'",
            "UPDATE scopes SET json = '{'",
            "UPDATE scopes SET json = replace(json, 'default', 'another')",
            "UPDATE chunks SET anchors = x'00'",
            "DROP TABLE scopes",
        ],
    )
    def test_rows_are_not_believed(self, open_disk: OpenDisk, chunks, statement):
        """SQLite doesn't notice a flipped bit in a row; other ids than the key's would match the wrong tokens."""
        store = open_disk()
        for chunk in chunks:
            store.put(chunk)
        store.close()
        with sqlite3.connect(self.manifest(store)) as db:
            db.execute(statement)
        db.close()
        store = open_disk()
        assert all(np.array_equal(store.ids(chunk.key), chunk.ids) for chunk in chunks)
        assert {c.key for c in store.added_since(SCOPE.digest, 0)[1]} == {chunk.key for chunk in chunks}
        assert {info.scope for info in store.entries()} == {SCOPE}

    def test_whoever_finds_the_damage_second_takes_the_new_manifest(self, open_disk: OpenDisk, chunks, monkeypatch):
        first, second = open_disk(), open_disk()
        first.put(chunks[0])
        with contextlib.closing(sqlite3.connect(self.manifest(first), isolation_level=None)) as db:
            db.execute("UPDATE chunks SET ids = zeroblob(160)")
        replace = second._manifest._replace

        def late(cause: Exception) -> None:
            assert np.array_equal(first.ids(chunks[0].key), chunks[0].ids)
            replace(cause)

        monkeypatch.setattr(second._manifest, "_replace", late)
        assert np.array_equal(second.ids(chunks[0].key), chunks[0].ids)
        assert self.manifest(second) == self.manifest(first)
        assert len(list((second.directory / "quarantine").glob("*.sqlite"))) == 1

    def test_a_newer_store_is_refused(self, open_disk: OpenDisk, chunks):
        store = open_disk()
        store.put(chunks[0])
        store.close()
        with sqlite3.connect(self.manifest(store)) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
        before = sorted(path.name for path in store.directory.rglob("*"))
        with pytest.raises(StoreError, match="newer version"):
            open_disk()
        assert sorted(path.name for path in store.directory.rglob("*")) == before

    def test_a_damaged_chunk_is_left_out_of_a_rebuild(self, open_disk: OpenDisk, chunks, caplog):
        store = open_disk()
        for chunk in chunks:
            store.put(chunk)
        store.close()
        os.truncate(file_of(store, chunks[0].key), 100)
        misplaced = file_of(store, chunks[0].key).with_stem("0" * 32)
        shutil.copy(file_of(store, chunks[1].key), misplaced)
        self.manifest(store).unlink()
        store = open_disk()
        assert {info.key for info in store.entries()} == {chunk.key for chunk in chunks[1:]}
        assert chunks[0].key in caplog.text
        assert misplaced.name in caplog.text
        assert store.put(chunks[0]) > 0
        assert same(store.get(chunks[0].key), chunks[0])

    @pytest.mark.parametrize("damaged", [False, True])
    def test_many_openers_build_one_manifest(self, tmp_path: Path, chunks, damaged):
        for attempt in range(5):
            directory = tmp_path / str(attempt)
            if damaged:
                store = DiskStore(directory)
                store.put(chunks[0])
                store.close()
                self.damage(self.manifest(store), "noise")
            together = threading.Barrier(6)

            def open_at_once(directory: Path = directory, together: threading.Barrier = together) -> DiskStore:
                together.wait()
                return DiskStore(directory)

            with ThreadPoolExecutor(6) as pool:
                stores = [future.result() for future in [pool.submit(open_at_once) for _ in range(6)]]
            assert self.manifest(stores[0])
            assert len(list((directory / "quarantine").iterdir())) == damaged
            for store in stores:
                assert len(list(store.entries())) == damaged
                store.close()


def test_ids_of_a_chunk_that_another_process_deleted(open_disk: Callable[..., DiskStore]) -> None:
    """Token ids stay in memory, but not longer than the chunk is there."""
    reader, other = open_disk(), open_disk()
    chunk = make_chunk(1)
    reader.put(chunk)
    for _ in range(2):
        ids = reader.ids(chunk.key)
        assert ids is not None
        assert ids.tolist() == chunk.ids.tolist()
    other.delete(chunk.key)
    assert reader.ids(chunk.key) is None
    other.put(chunk)
    ids = reader.ids(chunk.key)
    assert ids is not None
    assert ids.tolist() == chunk.ids.tolist()
