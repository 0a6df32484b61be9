"""What a store's directory holds, looked at again and again."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from pathlib import Path

from cacheblend_rag.store.disk import DiskStore

_SHARE = 0.05  # of the time, at most, is spent on listing a large store


@dataclasses.dataclass(frozen=True)
class TenantUse:
    """Chunks of one model, dtype and namespace.

    Attributes:
        model: The name that the store has for it.
        dtype: Its dtype.
        namespace: The namespace.
        chunks: How many.
        tokens: Their tokens.
        nbytes: Bytes of their files.
        last_used: When one of them was last read or stored, Unix seconds.
    """

    model: str
    dtype: str
    namespace: str
    chunks: int
    tokens: int
    nbytes: int
    last_used: float


@dataclasses.dataclass(frozen=True)
class DiskUse:
    """What is on disk.

    Attributes:
        tenants: What each has, the largest first.
        free: Bytes that are free on the store's file system.
        listed: When this was looked at, Unix seconds.
    """

    tenants: tuple[TenantUse, ...]
    free: int
    listed: float

    @property
    def chunks(self) -> int:
        """All chunks."""
        return sum(tenant.chunks for tenant in self.tenants)

    @property
    def nbytes(self) -> int:
        """Bytes of all chunk files."""
        return sum(tenant.nbytes for tenant in self.tenants)


class StoreView:
    """Looks at a store. Threads may share it.

    Args:
        directory: A store's.

    Raises:
        StoreError: it can't be opened, or is no store.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._store = DiskStore(directory)
        self._mutex = threading.Lock()
        self._last: DiskUse | None = None
        self._again_at = 0.0

    def use(self) -> DiskUse:
        """What is there now; where listing takes long, what was there a while ago.

        Raises:
            OSError: the store can't be read.
        """
        with self._mutex:
            if self._last is None or time.monotonic() >= self._again_at:
                started = time.monotonic()
                self._last = self._list()
                took = time.monotonic() - started
                self._again_at = started + took / _SHARE
            return self._last

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _list(self) -> DiskUse:
        tenants: dict[tuple[str, str, str], TenantUse] = {}
        for entry in self._store.entries():
            model = entry.scope.fingerprint
            key = (model.name, model.dtype, entry.scope.namespace)
            before = tenants.get(key) or TenantUse(*key, 0, 0, 0, 0.0)
            tenants[key] = dataclasses.replace(
                before,
                chunks=before.chunks + 1,
                tokens=before.tokens + entry.tokens,
                nbytes=before.nbytes + entry.nbytes,
                last_used=max(before.last_used, entry.last_used),
            )
        ordered = sorted(tenants.values(), key=lambda tenant: tenant.nbytes, reverse=True)
        return DiskUse(tuple(ordered), shutil.disk_usage(self.directory).free, time.time())
