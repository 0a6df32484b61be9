"""What goes wrong with disks: damage is a miss, a full disk an error, and neither costs what was stored before."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from store_chunks import make_chunk, same
from store_work import fill_up

import cacheblend_rag.store
from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import DiskStore

OpenDisk = Callable[..., DiskStore]
CRASHES = 12  # of some hundred possible ones, others in each run
CHUNKS = [make_chunk(n, tokens=24) for n in range(4)]


def file_of(store: DiskStore, key: str) -> Path:
    (path,) = store.directory.glob(f"chunks/*/{key}.safetensors")
    return path


def assert_one_fault(store: DiskStore, key: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The chunk is a miss, told once, counted, kept in quarantine, and can be stored again."""
    faults, damaged = store.faults, path.read_bytes()
    caplog.clear()
    assert store.get(key) is None
    assert store.faults == faults + 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.message
    assert key not in store
    assert store.ids(key) is None
    (aside,) = (store.directory / "quarantine").iterdir()
    assert aside.read_bytes() == damaged
    aside.unlink()
    assert store.get(key) is None  # now an ordinary miss
    assert store.faults == faults + 1
    chunk = next(chunk for chunk in CHUNKS if chunk.key == key)
    assert store.put(chunk) > 0
    assert same(store.get(key), chunk)


@pytest.fixture
def store(open_disk: OpenDisk) -> DiskStore:
    store = open_disk()
    for chunk in CHUNKS:
        store.put(chunk)
    return store


def test_bit_flips(store: DiskStore, caplog: pytest.LogCaptureFixture):
    rng = np.random.default_rng()
    key = CHUNKS[1].key
    path = file_of(store, key)
    for _ in range(60):
        data = bytearray(path.read_bytes())
        place = rng.integers(len(data))
        data[place] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        assert_one_fault(store, key, path, caplog)
    assert all(same(store.get(chunk.key), chunk) for chunk in CHUNKS)


def test_truncation_and_growth(store: DiskStore, caplog: pytest.LogCaptureFixture):
    rng = np.random.default_rng()
    key = CHUNKS[2].key
    path = file_of(store, key)
    size = path.stat().st_size
    for length in [0, 1, 7, 8, size - 1, size + 1, 1 << 40, *rng.integers(size, size=20)]:
        if length == 1 << 40:  # a sparse terabyte must not be read
            os.truncate(path, length)
            assert store.get(key) is None
            (aside,) = (store.directory / "quarantine").iterdir()
            aside.unlink()
            store.put(CHUNKS[2])
        else:
            os.truncate(path, length)
            assert_one_fault(store, key, path, caplog)


def test_a_foreign_file(store: DiskStore, caplog: pytest.LogCaptureFixture):
    path = file_of(store, CHUNKS[0].key)
    shutil.copy(file_of(store, CHUNKS[1].key), path)
    assert_one_fault(store, CHUNKS[0].key, path, caplog)
    assert same(store.get(CHUNKS[1].key), CHUNKS[1])


def test_a_file_somebody_deleted(store: DiskStore, caplog: pytest.LogCaptureFixture):
    file_of(store, CHUNKS[0].key).unlink()
    assert CHUNKS[0].key not in store
    assert store.get(CHUNKS[0].key) is None
    assert store.faults == 1
    assert CHUNKS[0].key in caplog.text
    assert store.ids(CHUNKS[0].key) is None
    assert store.get(CHUNKS[0].key) is None
    assert store.faults == 1
    assert store.put(CHUNKS[0]) > 0


def test_put_replaces_a_file_somebody_deleted(store: DiskStore):
    file_of(store, CHUNKS[0].key).unlink()
    assert store.put(CHUNKS[0]) > 0
    assert same(store.get(CHUNKS[0].key), CHUNKS[0])
    assert store.faults == 0


def test_a_chunk_that_can_t_be_listed_is_not_stored(store: DiskStore):
    (manifest,) = store.directory.glob("manifest-*.sqlite")
    with contextlib.closing(sqlite3.connect(manifest, isolation_level=None)) as db:
        db.execute("CREATE TRIGGER full BEFORE INSERT ON chunks BEGIN SELECT RAISE(ABORT, 'no room'); END")
        new = make_chunk(9)
        with pytest.raises(StoreError, match="no room"):
            store.put(new)
        assert {check.key: check.state for check in store.verify()} == {chunk.key: "ok" for chunk in CHUNKS}
        assert list((store.directory / "tmp").iterdir()) == []
        db.execute("DROP TRIGGER full")
    assert store.put(new) > 0


def test_an_unreadable_file_is_left_where_it_is(store: DiskStore, caplog: pytest.LogCaptureFixture):
    path = file_of(store, CHUNKS[0].key)
    path.unlink()
    path.mkdir()
    assert store.get(CHUNKS[0].key) is None
    assert store.faults == 1
    assert str(path) in caplog.text
    assert path.is_dir()
    assert {check.state for check in store.verify() if check.path == path} == {"corrupt"}


def test_a_good_file_that_replaced_a_damaged_one_stays(store: DiskStore, open_disk: OpenDisk, monkeypatch):
    """Another process has quarantined the file and stored it again between our reading it and our moving it."""
    other = open_disk()
    key = CHUNKS[0].key
    path = file_of(store, key)
    os.truncate(path, 50)
    transaction = store._manifest.transaction

    def late(work):
        monkeypatch.undo()
        assert other.get(key) is None
        other.put(CHUNKS[0])
        return transaction(work)

    monkeypatch.setattr(store._manifest, "transaction", late)
    assert store.get(key) is None
    assert same(store.get(key), CHUNKS[0])
    assert key in store
    assert len(list((store.directory / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failed_write(store: DiskStore, monkeypatch: pytest.MonkeyPatch, code: int, call: str):
    original = getattr(os, call)

    def fail(*args, **kwargs):
        if call == "open" and not args[1] & os.O_EXCL:
            return original(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    new = make_chunk(9)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreError) as caught:
        store.put(new)
    monkeypatch.undo()
    message = str(caught.value)
    assert os.strerror(code) in message
    assert str(store.directory) in message
    assert "\n" not in message
    assert ("free some space" in message) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert list((store.directory / "tmp").iterdir()) == []
    assert new.key not in store
    assert {check.state for check in store.verify()} == {"ok"}
    assert all(same(store.get(chunk.key), chunk) for chunk in CHUNKS)
    assert store.put(new) > 0
    assert same(store.get(new.key), new)


def in_fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a fork; its exit status, 0 if all went well."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    status = 1
    try:
        torch.set_num_threads(1)  # the others are not in the fork: whoever waits for them waits for ever
        signal.alarm(60)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_file_size_limit(tmp_path: Path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        fill_up(tmp_path)

    assert in_fork(limited) == 0


def test_a_full_disk(tmp_path: Path):
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"mount -t tmpfs -o size=3m tmpfs {tmp_path} && "]
    if (
        not shutil.which("unshare")
        or subprocess.run([*mounted[:-1], mounted[-1] + "true"], capture_output=True).returncode
    ):
        pytest.skip("a small file system can't be mounted here")
    code = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        f"from pathlib import Path; from store_work import fill_up; fill_up(Path({str(tmp_path)!r}))"
    )
    mounted[-1] += 'exec "$@"'
    result = subprocess.run([*mounted, "sh", sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


STORE_CODE = os.path.dirname(cacheblend_rag.store.__file__)


class Steps:
    """Counts calls out of the store's code (to the system, to SQLite), before and after each; kills at one of them."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.count = 0
        self.kill_at = kill_at

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event.startswith("c_") and frame.f_code.co_filename.startswith(STORE_CODE):
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def during(self, work: Callable[[], object]) -> None:
        sys.setprofile(self)
        try:
            work()
        finally:
            sys.setprofile(None)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("operation", ["put", "put_and_evict", "delete", "quarantine", "repair", "create", "rebuild"])
def test_a_crash_at_any_step(tmp_path: Path, operation: str):
    """Killed anywhere: whatever the operation was not about is there, and what it was about is there or not."""
    template = tmp_path / "template"
    store = DiskStore(template)
    (size,) = {store.put(chunk) for chunk in CHUNKS}
    damaged = file_of(store, CHUNKS[0].key).relative_to(template)
    store.close()
    if operation in ("quarantine", "repair"):
        os.truncate(template / damaged, 100)
    if operation == "rebuild":
        (manifest,) = template.glob("manifest-*")
        manifest.write_bytes(b"damaged")
    if operation == "create":
        shutil.rmtree(template)
    new = make_chunk(9, tokens=24)
    work = {
        "put": lambda path: DiskStore(path).put(new),
        "put_and_evict": lambda path: DiskStore(path, 4 * size).put(new),
        "delete": lambda path: DiskStore(path).delete(CHUNKS[0].key),
        "quarantine": lambda path: DiskStore(path).get(CHUNKS[0].key),
        "repair": lambda path: list(DiskStore(path).verify(repair=True)),
        "create": DiskStore,
        "rebuild": DiskStore,
    }[operation]
    affected = {"put": {new.key}, "create": set(), "rebuild": set()}.get(operation, {new.key, CHUNKS[0].key})
    before = [] if operation == "create" else CHUNKS

    path = tmp_path / "crashed"

    def prepare() -> None:
        if path.exists():
            shutil.rmtree(path)
        if template.exists():
            shutil.copytree(template, path)

    prepare()
    dry = Steps()
    dry.during(lambda: work(path))
    assert dry.count > 30
    for step in np.random.default_rng().choice(dry.count, CRASHES, replace=False):
        prepare()
        status = in_fork(lambda step=step: Steps(step).during(lambda: work(path)))
        assert os.WTERMSIG(status) == signal.SIGKILL
        store = DiskStore(path)
        for chunk in before:
            assert same(store.get(chunk.key), chunk) or chunk.key in affected, step
        assert {check.key for check in store.verify() if check.state != "ok"} <= affected, step
        list(store.verify(repair=True))
        assert {check.state for check in store.verify()} <= {"ok"}, step
        for chunk in [*CHUNKS, new]:
            store.put(chunk)
            assert same(store.get(chunk.key), chunk), step
        assert {info.key for info in store.entries()} == {chunk.key for chunk in [*CHUNKS, new]}, step
        store.close()
        for temp in (path / "tmp").iterdir():
            os.utime(temp, (time.time() - 7200,) * 2)
        DiskStore(path).close()
        assert list((path / "tmp").iterdir()) == [], step
