"""Chunks in a directory, one file each, shared by any number of processes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from cacheblend_rag.chunks import ChunkKV, ChunkScope, TokenIds
from cacheblend_rag.errors import StoreError
from cacheblend_rag.store.base import ChunkInfo, IndexedChunk
from cacheblend_rag.store.chunkfile import DamagedChunkError, pack, read_chunk, read_ids
from cacheblend_rag.store.manifest import Manifest

_MARKER = "cacheblend-store.lock"
_SUFFIX = ".safetensors"
_KEY = re.compile(r"[0-9a-f]{32}")
_OLD_SECONDS = 3600.0  # no write takes an hour: whoever was writing is gone
_KNOWN_IDS = 16384  # chunks whose token ids are kept in memory: some 32 MB
_FLUSH_SECONDS = 10.0
_BATCH = 256  # files deleted in one transaction, while other writers wait

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ChunkCheck:
    """What :meth:`DiskStore.verify` found about one chunk.

    Attributes:
        key: The chunk's key, or the name of a file that isn't named as a chunk.
        path: Its file.
        state: ``"ok"``; ``"corrupt"`` (the file is damaged, foreign or unreadable); ``"missing"`` (listed, but there is
            no file); ``"orphan"`` (a sound file that isn't listed, so no prompt finds it).
        cause: What is wrong; empty if nothing is.
    """

    key: str
    path: Path
    state: Literal["ok", "corrupt", "missing", "orphan"]
    cause: str = ""


class DiskStore:
    """A store in a local directory, for any number of threads and processes; not to be used across a fork.

    ::

        <directory>/                    mode 0700 if made here
            cacheblend-store.lock       marks the directory as a store
            manifest-<n>.sqlite         what is there; see Manifest
            chunks/ab/<key>.safetensors one chunk; see chunkfile
            profiles/<weights>.json     what was measured of a model; see model_profile
            tmp/                        files being written
            quarantine/                 damaged files, out of the way; may be deleted

    Files are written in ``tmp`` and renamed into place, so a chunk is there in full or not at all. They are renamed and
    deleted only within a manifest transaction, one process at a time, so files and manifest agree; a crash between the
    two leaves a miss, or a file that the next :meth:`put` or :meth:`verify` lists.

    Attributes:
        directory: Where it is.
        faults: Stored chunks that could not be read since the store was opened.

    Args:
        directory: Made if missing. If it exists, it must be a store or empty.
        max_bytes: Most bytes of chunk files, enforced by each :meth:`put`: the least recently used chunks go. None: no
            limit. A chunk larger than that is not kept.

    Raises:
        StoreError: the directory can't be made or written, or holds something else.
    """

    def __init__(self, directory: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        self.directory = Path(directory)
        self.faults = 0
        self.max_bytes = max_bytes
        self._chunks = self.directory / "chunks"
        self._tmp = self.directory / "tmp"
        self._quarantine = self.directory / "quarantine"
        self._mutex = threading.Lock()
        self._used: dict[str, float] = {}
        self._known_ids: dict[str, TokenIds] = {}
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        with self._os_errors("can't be opened"):
            self._prepare()
        self._manifest = Manifest(
            self.directory, lock=self.directory / _MARKER, aside=self._quarantine, scan=self._scan
        )

    def __repr__(self) -> str:
        return f"DiskStore({str(self.directory)!r})"

    def __reduce__(self) -> tuple[type[DiskStore], tuple[Path, int | None]]:
        return DiskStore, (self.directory, self.max_bytes)  # pickled as where it is: another process opens it again

    def put(self, chunk: ChunkKV) -> int:
        """See :meth:`ChunkStore.put`.

        Raises:
            StoreError: the store can't be written; nothing stored is lost.
            ValueError: the chunk's key, shape or dtype is not what a chunk's must be.
        """
        pieces = pack(chunk)
        nbytes = sum(len(piece) for piece in pieces)
        if chunk.key in self:
            return 0
        if self.max_bytes is not None and nbytes > self.max_bytes:
            _log.warning("chunk %s (%d bytes) is larger than the whole store may be: not stored", chunk.key, nbytes)
            return 0
        temp = self._tmp / uuid.uuid4().hex
        try:
            with self._os_errors("can't be written"):
                _write(temp, pieces)
            written = self._publish(temp, chunk, nbytes)
        finally:
            with contextlib.suppress(OSError):
                temp.unlink()
        self._evict()
        return written

    def get(self, key: str) -> ChunkKV | None:
        """See :meth:`ChunkStore.get`. A file that isn't this chunk, whole and undamaged, is moved to quarantine.

        The tensor may be shared with other readers: don't write to it.
        """
        if not _KEY.fullmatch(key):
            return None
        path = self._path(key)
        try:
            with path.open("rb") as file:
                try:
                    chunk = _read(file, key)
                except DamagedChunkError as error:
                    self._fault(path, error)
                    self._set_aside(path, os.fstat(file.fileno()))
                    return None
        except FileNotFoundError:
            self._missed(key)
            return None
        except OSError as error:
            self._fault(path, error)
            return None
        self.touch(key)
        return chunk

    def touch(self, key: str) -> None:
        """Count as a use of a chunk that was read elsewhere. Uses are written down now and then, all at once."""
        with self._mutex:
            self._used[key] = time.time()
            due = time.monotonic() >= self._flush_at
        if due:
            self._flush()

    def ids(self, key: str) -> TokenIds | None:
        """See :meth:`ChunkStore.ids`."""
        known = self._known_ids.get(key)
        if known is not None and self._has_file(key):
            return known  # a key has the same ids for ever
        ids = self._manifest.ids(key)
        with self._mutex:
            self._known_ids.pop(key, None)
            if ids is not None:
                self._known_ids[key] = ids
                if len(self._known_ids) > _KNOWN_IDS:
                    self._known_ids.pop(next(iter(self._known_ids)))
        return ids

    def __contains__(self, key: object) -> bool:
        """See :meth:`ChunkStore.__contains__`."""
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            return False
        return self._has_file(key) and key in self._manifest

    def delete(self, key: str) -> bool:
        """See :meth:`ChunkStore.delete`.

        Raises:
            StoreError: the store can't be written.
        """
        return self._delete([key]) > 0

    def remove(self, *, prefix: str = "", namespace: str | None = None) -> int:
        """Delete the chunks whose key begins with ``prefix``, of one namespace or (None) of all.

        Without arguments that is every chunk. Returns how many there were.

        Raises:
            StoreError: the store can't be written; chunks not yet deleted stay.
        """
        keys = [
            info.key
            for info in self._manifest.entries()
            if info.key.startswith(prefix) and namespace in (None, info.scope.namespace)
        ]
        return sum(self._delete(keys[i : i + _BATCH]) for i in range(0, len(keys), _BATCH))

    def entries(self) -> Iterator[ChunkInfo]:
        """See :meth:`ChunkStore.entries`. ``nbytes`` is the size of the file."""
        self._flush()
        return iter(self._manifest.entries())

    def added_since(self, scope_digest: str, cursor: int) -> tuple[int, list[IndexedChunk]]:
        """See :meth:`ChunkStore.added_since`. A chunk may be reported again after it was stored anew, or a rebuild."""
        return self._manifest.added_since(scope_digest, cursor)

    def keys_since(self, scope_digest: str, cursor: int, limit: int) -> tuple[int, list[str]]:
        """See :meth:`ChunkStore.keys_since`."""
        return self._manifest.keys_since(scope_digest, cursor, limit)

    def prefetch(self, key: str) -> None:
        """See :meth:`ChunkStore.prefetch`: there is one tier."""

    def verify(self, *, repair: bool = False) -> Iterator[ChunkCheck]:
        """Read every chunk file and compare all with the manifest; yields one finding a chunk.

        Args:
            repair: Also move corrupt files to quarantine, forget missing ones and list orphans. The findings are those
                before the repair.

        Raises:
            StoreError: the store can't be read or, to repair it, written.
        """
        self._remove_old_temps()
        for path in self._files():
            check = self._check_file(path, repair)
            if check is not None:
                yield check
        for info in self._manifest.entries():
            path = self._path(info.key)
            if not os.path.exists(path) and info.key in self._manifest:
                yield ChunkCheck(info.key, path, "missing", "its file is gone")
                if repair:
                    self._drop_missing(info.key)

    def close(self) -> None:
        """See :meth:`ChunkStore.close`."""
        self._flush()
        self._manifest.close()

    def _prepare(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker = self.directory / _MARKER
        # A new volume's root is never quite empty. Looked at twice: another process may be making the same store.
        foreign = set(os.listdir(self.directory)) - {"lost+found"}
        if foreign and not marker.exists():
            raise StoreError(
                f"{self.directory} holds other things (such as {min(foreign)}) and is not a chunk store; "
                "name an empty or a new directory"
            )
        os.close(os.open(marker, os.O_RDWR | os.O_CREAT, 0o600))
        for directory in (self._chunks, self._tmp, self._quarantine):
            directory.mkdir(mode=0o700, exist_ok=True)
        self._remove_old_temps()

    def _remove_old_temps(self) -> None:
        with self._os_errors("can't be cleaned up"):
            for temp in self._tmp.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - temp.stat().st_mtime > _OLD_SECONDS:
                        temp.unlink()

    def _path(self, key: str) -> Path:
        return self._chunks / key[:2] / f"{key}{_SUFFIX}"

    def _has_file(self, key: str) -> bool:
        # Asked of every chunk in every prompt: making a Path would take longer than looking.
        return os.path.exists(f"{self._chunks}/{key[:2]}/{key}{_SUFFIX}")

    def _files(self) -> Iterator[Path]:
        """Every file that is, or is where there should be, a chunk."""
        with self._os_errors("can't be listed"):
            for directory in sorted(path for path in self._chunks.iterdir() if path.is_dir()):
                yield from sorted(directory.iterdir())

    def _scan(self) -> Iterator[tuple[ChunkInfo, TokenIds]]:
        """What the manifest says of each chunk, from the chunk files' headers."""
        for path in self._files():
            try:
                with path.open("rb") as file:
                    header, ids = read_ids(file)
                    if self._path(header.key) != path:
                        raise DamagedChunkError(f"it holds chunk {header.key}")
                    yield _info(header.key, header.scope, len(ids), os.fstat(file.fileno())), ids
            except (DamagedChunkError, OSError) as error:
                _log.warning("chunk file %s left out of the manifest: %s", path, error)

    def _publish(self, temp: Path, chunk: ChunkKV, nbytes: int) -> int:
        """Rename a written file into place and list it; 0 if another process was faster."""
        path = self._path(chunk.key)
        now = time.time()
        info = ChunkInfo(chunk.key, chunk.scope, len(chunk.ids), nbytes, now, now)
        placed = False

        def publish(db: sqlite3.Connection) -> int:
            nonlocal placed
            if not placed:
                if os.path.exists(path) and Manifest.lists(db, chunk.key):
                    return 0
                with self._os_errors("can't be written"):
                    path.parent.mkdir(mode=0o700, exist_ok=True)
                    os.replace(temp, path)
                placed = True
            Manifest.add(db, info, chunk.ids)
            return nbytes

        try:
            return self._manifest.transaction(publish)
        except BaseException:
            if placed:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise

    def _evict(self) -> None:
        self._flush()
        max_bytes = self.max_bytes
        if max_bytes is not None:
            self._manifest.transaction(lambda db: self._delete_files(db, Manifest.least_recently_used(db, max_bytes)))

    def _delete(self, keys: Sequence[str]) -> int:
        return self._manifest.transaction(lambda db: self._delete_files(db, keys))

    def _delete_files(self, db: sqlite3.Connection, keys: Sequence[str]) -> int:
        count = 0
        for key in filter(_KEY.fullmatch, keys):
            with self._os_errors("can't be written"):
                self._path(key).unlink(missing_ok=True)
            count += Manifest.drop(db, key)
        return count

    def _missed(self, key: str) -> None:
        """There is no such file: nothing unusual, unless the manifest lists it."""
        with contextlib.suppress(StoreError):
            if self._drop_missing(key):
                self._fault(self._path(key), "it is gone")

    def _drop_missing(self, key: str) -> bool:
        """Forget a chunk whose file is gone."""
        if key not in self._manifest:
            return False
        return self._manifest.transaction(lambda db: not os.path.exists(self._path(key)) and Manifest.drop(db, key))

    def _fault(self, path: Path, cause: object) -> None:
        with self._mutex:
            self.faults += 1
        _log.warning("chunk file %s can't be used: %s", path, cause)

    def _set_aside(self, path: Path, read: os.stat_result) -> None:
        """Move a damaged file to quarantine, unless it has been replaced since it was read."""
        aside = self._quarantine / f"{path.stem}-{time.time_ns()}{path.suffix}"

        def move(db: sqlite3.Connection) -> None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), read):
                    os.replace(path, aside)
                    if path == self._path(path.stem):
                        Manifest.drop(db, path.stem)

        try:
            self._manifest.transaction(move)
        except OSError as error:
            _log.warning("chunk file %s can't be moved to %s: %s", path, aside, error)

    def _check_file(self, path: Path, repair: bool) -> ChunkCheck | None:
        """Verify one file; None if it was deleted meanwhile."""
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                try:
                    chunk = _read(file, path.stem)
                    if path != self._path(path.stem):
                        raise DamagedChunkError("it is not where its chunk belongs")
                except DamagedChunkError as error:
                    if repair:
                        self._set_aside(path, stat)
                    return ChunkCheck(path.stem, path, "corrupt", str(error))
        except FileNotFoundError:
            return None
        except OSError as error:
            return ChunkCheck(path.stem, path, "corrupt", error.strerror or str(error))
        if chunk.key in self._manifest or self._is_listed(chunk, path, stat, adopt=repair):
            return ChunkCheck(chunk.key, path, "ok")
        return ChunkCheck(chunk.key, path, "orphan", "the manifest doesn't list it")

    def _is_listed(self, chunk: ChunkKV, path: Path, stat: os.stat_result, *, adopt: bool) -> bool:
        """Whether the manifest lists a sound file, or is about to: asked in a transaction, when writers are done."""

        def ask(db: sqlite3.Connection) -> bool:
            if Manifest.lists(db, chunk.key) or not os.path.exists(path):
                return True
            if adopt:
                Manifest.add(db, _info(chunk.key, chunk.scope, len(chunk.ids), stat), chunk.ids)
            return False

        return self._manifest.transaction(ask)

    def _flush(self) -> None:
        """Write down the uses. Failing to costs nothing but the order of eviction."""
        with self._mutex:
            used, self._used = self._used, {}
            self._flush_at = time.monotonic() + _FLUSH_SECONDS
        if used:
            try:
                self._manifest.transaction(lambda db: Manifest.touch(db, used))
            except StoreError as error:
                _log.debug("uses of %d chunks not written down: %s", len(used), error)

    @contextlib.contextmanager
    def _os_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "free some space or set max_bytes" if full else "check that it is a directory you may write"
            raise StoreError(
                f"the chunk store {self.directory} {what} ({error.strerror or error}); {advice}"
            ) from error


def _info(key: str, scope: ChunkScope, tokens: int, stat: os.stat_result) -> ChunkInfo:
    return ChunkInfo(key, scope, tokens, stat.st_size, stat.st_mtime, stat.st_mtime)


def _read(file: BinaryIO, key: str) -> ChunkKV:
    chunk = read_chunk(file)
    if chunk.key != key:
        raise DamagedChunkError(f"it holds chunk {chunk.key}")
    return chunk


def _write(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    with open(path, "xb", opener=_private) as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        # The content must be safe before the name is; should a power cut lose the name, that is a miss.
        os.fsync(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
