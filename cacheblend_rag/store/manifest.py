"""The list of a disk store's chunks, in SQLite: what is there, how large, when used, and where to find it in prompts.

Everything in it can be made again from the chunk files, so a damaged manifest costs time and nothing else: it is set
aside and a new one is built. Each build is a new file, ``manifest-<generation>.sqlite``, because a process that still
has the old one open would, on closing it, delete the write-ahead log of a new one of the same name.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from cacheblend_rag.anchors import Anchors, sample_anchors
from cacheblend_rag.chunks import ChunkScope, TokenIds
from cacheblend_rag.errors import StoreError
from cacheblend_rag.store.base import ChunkInfo, IndexedChunk

# Older manifests are rebuilt, newer ones refused. To be raised with any change to the tables, to what is sampled as
# anchors, or to the format of chunk files.
SCHEMA = 1

# Blobs last: a listing then never reads the pages they overflow to. The triggers keep the sum of sizes at hand.
_TABLES = """
CREATE TABLE scopes (digest TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE chunks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL UNIQUE,
    scope TEXT NOT NULL REFERENCES scopes (digest),
    tokens INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    created REAL NOT NULL,
    last_used REAL NOT NULL,
    ids BLOB NOT NULL,
    anchors BLOB NOT NULL
);
CREATE INDEX chunks_by_scope ON chunks (scope, seq);
CREATE INDEX chunks_by_use ON chunks (last_used);
CREATE TABLE total (bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER chunk_added AFTER INSERT ON chunks BEGIN UPDATE total SET bytes = bytes + new.bytes; END;
CREATE TRIGGER chunk_dropped AFTER DELETE ON chunks BEGIN UPDATE total SET bytes = bytes - old.bytes; END;
"""

_BUSY_SECONDS = 30.0
_NAME = re.compile(r"manifest-(\d+)\.sqlite")
# SQLITE_ERROR: our statements are fixed, so a table or column that is missing means a manifest that is.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _DamagedRowError(Exception):
    """A row's content is not what was written."""


class Manifest:
    """The manifest of one store directory. Safe to use from several threads; several processes may have it open.

    Sequence numbers only ever grow, over rebuilds too: a rebuilt manifest starts above every earlier one, so whoever
    asks :meth:`added_since` with an old cursor sees all its chunks again and misses none.

    Args:
        directory: The store directory; it must exist.
        lock: A file in it, to lock while a manifest is built.
        aside: Where to move a damaged manifest.
        scan: Reads all chunk files' headers, for building a manifest.

    Raises:
        StoreError: the manifest can't be opened or was written by a newer version.
    """

    def __init__(
        self, directory: Path, *, lock: Path, aside: Path, scan: Callable[[], Iterator[tuple[ChunkInfo, TokenIds]]]
    ) -> None:
        self._directory = directory
        self._lock_file = lock
        self._aside = aside
        self._scan = scan
        self._mutex = threading.RLock()
        self._scopes: dict[str, ChunkScope] = {}
        self._path: Path | None = None
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._run(lambda db: None)

    def transaction(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run ``work`` in a write transaction, which no other process's overlaps; all or nothing is kept.

        If the manifest proves damaged, it is rebuilt and ``work`` runs once more.

        Raises:
            StoreError: the manifest can't be written.
        """

        def run(db: sqlite3.Connection) -> _T:
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")
            return result

        return self._run(run)

    @staticmethod
    def add(db: sqlite3.Connection, info: ChunkInfo, ids: TokenIds) -> None:
        """Add a chunk, or replace its row; within a transaction."""
        digest = info.scope.digest
        Manifest.drop(db, info.key)
        db.execute("INSERT OR IGNORE INTO scopes VALUES (?, ?)", (digest, info.scope.to_json()))
        db.execute(
            "INSERT INTO chunks (key, scope, tokens, bytes, created, last_used, ids, anchors)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                info.key,
                digest,
                info.tokens,
                info.nbytes,
                info.created,
                info.last_used,
                np.ascontiguousarray(ids, np.int32).tobytes(),
                sample_anchors(ids).to_bytes(),
            ),
        )

    @staticmethod
    def drop(db: sqlite3.Connection, key: str) -> bool:
        """Remove a chunk's row; False if there is none. Within a transaction."""
        return db.execute("DELETE FROM chunks WHERE key = ?", (key,)).rowcount > 0

    @staticmethod
    def lists(db: sqlite3.Connection, key: str) -> bool:
        """Whether a chunk has a row."""
        return db.execute("SELECT 1 FROM chunks WHERE key = ?", (key,)).fetchone() is not None

    @staticmethod
    def least_recently_used(db: sqlite3.Connection, max_bytes: int) -> list[str]:
        """Keys to remove so that the rest takes at most ``max_bytes``; within a transaction."""
        excess = db.execute("SELECT bytes FROM total").fetchone()[0] - max_bytes
        keys = []
        if excess > 0:
            for key, nbytes in db.execute("SELECT key, bytes FROM chunks ORDER BY last_used, seq"):
                keys.append(key)
                excess -= nbytes
                if excess <= 0:
                    break
        return keys

    @staticmethod
    def touch(db: sqlite3.Connection, used: Mapping[str, float]) -> None:
        """Note when chunks were used (Unix seconds by key); within a transaction."""
        db.executemany(
            "UPDATE chunks SET last_used = max(last_used, ?) WHERE key = ?", [(when, key) for key, when in used.items()]
        )

    def __contains__(self, key: str) -> bool:
        """Whether a chunk has a row."""
        return self._run(lambda db: self.lists(db, key))

    def ids(self, key: str) -> TokenIds | None:
        """The chunk's token ids, int32 ``[tokens]``."""

        def read(db: sqlite3.Connection) -> TokenIds | None:
            row = db.execute("SELECT scope, ids FROM chunks WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
            # SQLite has no checksums: without this a flipped bit would match a chunk to tokens it doesn't hold.
            scope = self._scope(db, row[0])
            with _decoding(f"chunk {key}"):
                ids = np.frombuffer(row[1], np.int32)
            if scope.key(ids) != key:
                raise _DamagedRowError(f"chunk {key} has other token ids than its key says")
            return ids

        return self._run(read)

    def entries(self) -> list[ChunkInfo]:
        """All chunks, most recently used first."""

        def read(db: sqlite3.Connection) -> list[ChunkInfo]:
            rows = db.execute(
                "SELECT key, scope, tokens, bytes, created, last_used FROM chunks ORDER BY last_used DESC, seq DESC"
            ).fetchall()
            return [ChunkInfo(key, self._scope(db, scope), *rest) for key, scope, *rest in rows]

        return self._run(read)

    def added_since(self, scope_digest: str, cursor: int) -> tuple[int, list[IndexedChunk]]:
        """See :meth:`ChunkStore.added_since`."""

        def read(db: sqlite3.Connection) -> list[tuple[int, IndexedChunk]]:
            rows = db.execute(
                "SELECT seq, key, anchors FROM chunks WHERE scope = ? AND seq > ? ORDER BY seq",
                (scope_digest, cursor),
            ).fetchall()
            with _decoding("an anchor row"):
                return [(seq, IndexedChunk(key, Anchors.from_bytes(anchors))) for seq, key, anchors in rows]

        rows = self._run(read)
        return (rows[-1][0] if rows else cursor), [chunk for _, chunk in rows]

    def keys_since(self, scope_digest: str, cursor: int, limit: int) -> tuple[int, list[str]]:
        """See :meth:`ChunkStore.keys_since`."""
        rows = self._run(
            lambda db: db.execute(
                "SELECT seq, key FROM chunks WHERE scope = ? AND seq > ? ORDER BY seq LIMIT ?",
                (scope_digest, cursor, limit),
            ).fetchall()
        )
        return (rows[-1][0] if rows else cursor), [key for _, key in rows]

    def close(self) -> None:
        """Close the connection; closing twice does nothing."""
        with self._mutex:
            self._disconnect()
            self._closed = True

    def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        with self._mutex:
            if self._closed:
                raise StoreError(f"the chunk store {self._directory} is closed; open it again to use it")
            try:
                try:
                    return work(self._connection())
                except (sqlite3.Error, _DamagedRowError) as error:
                    if not _is_damage(error):
                        raise
                    self._replace(error)
                    return work(self._connection())
            except StoreError:
                raise
            except (sqlite3.Error, _DamagedRowError, OSError) as error:
                raise StoreError(
                    f"the manifest of the chunk store {self._directory} can't be used ({error}); "
                    "check its free space and permissions"
                ) from error

    def _connection(self) -> sqlite3.Connection:
        # The file is gone when another process found it damaged and set it aside.
        if self._db is None or self._path is None or not self._path.exists():
            self._disconnect()
            with self._exclusively():
                self._path = self._newest() or self._build()
                self._db = self._connect(self._path)
        return self._db

    def _connect(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            schema = db.execute("PRAGMA user_version").fetchone()[0]
            if schema > SCHEMA:
                raise StoreError(
                    f"the chunk store {self._directory} was written by a newer version (schema {schema}, known is "
                    f"{SCHEMA}); update cacheblend-rag or use another directory"
                )
            if schema < SCHEMA:
                raise _DamagedRowError(f"it has schema {schema}, not {SCHEMA}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # survives a crash; a power cut may cost the last rows, no more
        except BaseException:
            db.close()
            raise
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _replace(self, cause: Exception) -> None:
        """Set the damaged manifest aside for a new one, unless another process has done so meanwhile."""
        self._disconnect()
        with self._exclusively():
            damaged = self._path
            if damaged is None or damaged != self._newest():
                return
            _log.warning("%s can't be used (%s): moved to %s, built anew from chunk files", damaged, cause, self._aside)
            self._build()
            for suffix in ("-wal", "-shm", ""):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{damaged}{suffix}", self._aside / f"{damaged.name}{suffix}")

    def _newest(self) -> Path | None:
        names = [name for name in os.listdir(self._directory) if _NAME.fullmatch(name)]
        return self._directory / max(names, key=_generation) if names else None

    def _build(self) -> Path:
        """A new manifest of all chunk files, put in place when it is complete."""
        newest = self._newest()
        # Sequence numbers start at the generation. It is the time in microseconds: above all that was numbered before,
        # even where somebody deleted the manifest, because no store takes a chunk a microsecond.
        generation = time.time_ns() // 1000
        if newest:
            generation = max(generation, _generation(newest.name) + (1 << 30))  # the clock may have gone back
        path = self._directory / f"manifest-{generation}.sqlite"
        temp = path.with_suffix(".building")
        temp.unlink(missing_ok=True)
        temp.touch(mode=0o600)  # it holds token ids; SQLite gives its log the same mode
        db = sqlite3.connect(temp, isolation_level=None)
        try:
            db.executescript(f"BEGIN; PRAGMA user_version = {SCHEMA}; {_TABLES}")
            db.execute("INSERT INTO sqlite_sequence VALUES ('chunks', ?)", (generation,))
            for info, ids in self._scan():
                self.add(db, info, ids)
            db.execute("COMMIT")
        finally:
            db.close()
        os.replace(temp, path)
        return path

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        with self._lock_file.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _scope(self, db: sqlite3.Connection, digest: str) -> ChunkScope:
        if digest not in self._scopes:
            row = db.execute("SELECT json FROM scopes WHERE digest = ?", (digest,)).fetchone()
            with _decoding(f"scope {digest}"):
                scope = ChunkScope.from_json(row[0])
                sound = scope.digest == digest
            if not sound:
                raise _DamagedRowError(f"scope {digest} is not what its digest says")
            self._scopes[digest] = scope
        return self._scopes[digest]


def _generation(name: str) -> int:
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


@contextlib.contextmanager
def _decoding(what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _DamagedRowError(f"{what} is unreadable: {error}") from error


def _is_damage(error: Exception) -> bool:
    if isinstance(error, _DamagedRowError):
        return True
    # Text that isn't UTF-8 is the one operational error that comes without SQLite's code.
    code = getattr(error, "sqlite_errorcode", None)
    return code & 0xFF in _DAMAGE if code is not None else isinstance(error, sqlite3.OperationalError)
