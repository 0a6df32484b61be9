"""Store fixtures. Helper modules beside this file are imported by name, here and in child processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cacheblend_rag.store import DiskStore

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def open_disk(tmp_path: Path) -> Iterator[Callable[..., DiskStore]]:
    """Opens stores in one directory, and closes them after the test."""
    stores: list[DiskStore] = []

    def open_(max_bytes: int | None = None) -> DiskStore:
        stores.append(DiskStore(tmp_path / "store", max_bytes))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()
