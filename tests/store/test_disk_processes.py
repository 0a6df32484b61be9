"""Several processes in one store directory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from store_chunks import SCOPE, same
from store_work import LIMIT, chunk_of, churn, churn_in_process

from cacheblend_rag.store import DiskStore, TieredStore, open_store


def test_two_processes_at_once(tmp_path: Path):
    """Both start by making the store, and both evict."""
    directory = tmp_path / "store"
    early = DiskStore(directory)
    cursor, nothing = early.added_since(SCOPE.digest, 0)
    assert nothing == []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(churn_in_process, [directory] * 2, range(2)))
    for hits, faults in results:
        assert hits > 50
        assert faults == 0
    infos = list(early.entries())
    assert 0 < sum(info.nbytes for info in infos) <= LIMIT
    checks = list(early.verify())
    assert {check.state for check in checks} == {"ok"}
    assert {check.key for check in checks} == {info.key for info in infos}
    assert all(early.get(info.key) is not None for info in infos)
    _, added = early.added_since(SCOPE.digest, cursor)
    assert {chunk.key for chunk in added} == {info.key for info in infos}
    assert list((directory / "tmp").iterdir()) == []
    assert list((directory / "quarantine").iterdir()) == []
    early.close()


def test_threads_share_a_store(tmp_path: Path):
    store = DiskStore(tmp_path, LIMIT)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: churn(store, seed), range(4)))
    assert store.faults == 0
    assert {check.state for check in store.verify()} == {"ok"}
    assert sum(info.nbytes for info in store.entries()) <= LIMIT
    store.close()


@pytest.mark.parametrize("opened", [DiskStore, open_store])
def test_what_another_connection_did_is_seen(tmp_path: Path, opened: Callable[[Path], DiskStore | TieredStore]):
    ours, theirs = opened(tmp_path), opened(tmp_path)
    seen: set[str] = set()
    cursor = 0
    for n in range(5):
        chunk = chunk_of(n)
        theirs.put(chunk)
        cursor, added = ours.added_since(SCOPE.digest, cursor)
        assert [c.key for c in added] == [chunk.key]
        seen.add(chunk.key)
        assert chunk.key in ours
        assert same(ours.get(chunk.key), chunk)
    theirs.delete(chunk_of(0).key)
    assert chunk_of(0).key not in ours
    assert ours.ids(chunk_of(0).key) is None
    assert {info.key for info in ours.entries()} == seen - {chunk_of(0).key}
    ours.close()
    theirs.close()
