"""Which chunks were warmed for which document: what a later run compares with."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from cacheblend_rag.errors import StoreError

_BUSY_SECONDS = 30.0
_TABLES = (
    "CREATE TABLE ledger (id TEXT NOT NULL, generation INTEGER NOT NULL)",
    "CREATE TABLE chunks (scope TEXT, document TEXT, key TEXT, text TEXT NOT NULL,"
    " PRIMARY KEY (scope, document, key)) WITHOUT ROWID",
    "CREATE INDEX chunks_by_key ON chunks (scope, key)",
)


@dataclasses.dataclass
class DocumentChunks:
    """The chunks of a document that a transformation was given.

    Attributes:
        texts: By chunk key.
        complete: They are all it has, not a part of them.
    """

    texts: dict[str, str]
    complete: bool


class Ledger:
    """One file, for any number of processes, each with objects of its own.

    Attributes:
        id: Another file, another id.
        generation: Grows whenever a chunk was taken out, or was found lost and warmed again. As long as id and
            generation are what they were, and nothing is :meth:`lost`, all that was recorded meanwhile is warm.

    Args:
        path: Made if missing.
        scope: Digest of the namespace, model and primer whose chunks these are.

    Raises:
        StoreError: the file can't be opened or written, or is something else. Every method may raise it.
    """

    def __init__(self, path: str, scope: str) -> None:
        self._path = Path(path)
        self._scope = scope
        with self._errors():
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch(mode=0o600)  # it holds the texts
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                with self._transaction():
                    if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                        for statement in _TABLES:
                            self._db.execute(statement)
                        self._db.execute("INSERT INTO ledger VALUES (?, 0)", (uuid.uuid4().hex,))
                self.id, self.generation = self._db.execute("SELECT id, generation FROM ledger").fetchone()
            except BaseException:
                self._db.close()
                raise

    def documents(self) -> list[str]:
        """All documents with recorded chunks."""
        rows = self._rows("SELECT DISTINCT document FROM chunks WHERE scope = ?", self._scope)
        return [document for (document,) in rows]

    def lost(self, stored: Collection[str]) -> dict[str, str]:
        """Recorded chunks that aren't stored: their texts by key."""
        keys = [key for (key,) in self._rows("SELECT DISTINCT key FROM chunks WHERE scope = ?", self._scope)]
        find = "SELECT text FROM chunks WHERE scope = ? AND key = ?"
        return {key: self._rows(find, self._scope, key)[0][0] for key in keys if key not in stored}

    def replaced(self, documents: Mapping[str, DocumentChunks]) -> list[str]:
        """Keys that nobody holds any more once ``documents`` are what they are now."""
        changed = [name for name, document in documents.items() if document.complete]
        kept = {key for document in documents.values() for key in document.texts}
        return [key for key in self.exclusive(changed) if key not in kept]

    def exclusive(self, documents: Collection[str]) -> list[str]:
        """Keys that these documents hold and no other."""
        found: dict[str, None] = {}
        for document in documents:
            for (key,) in self._rows("SELECT key FROM chunks WHERE scope = ? AND document = ?", self._scope, document):
                holders = self._rows("SELECT document FROM chunks WHERE scope = ? AND key = ?", self._scope, key)
                if all(holder in documents for (holder,) in holders):
                    found[key] = None
        return list(found)

    def record(self, documents: Mapping[str, DocumentChunks]) -> None:
        """Write down the chunks of documents: in place of what a complete one had, in addition otherwise."""
        with self._errors(), self._transaction():
            removed = 0
            for name, document in documents.items():
                if document.complete:
                    removed += self._remove_others(name, document.texts)
                self._db.executemany(
                    "INSERT OR IGNORE INTO chunks VALUES (?, ?, ?, ?)",
                    [(self._scope, name, key, text) for key, text in document.texts.items()],
                )
            if removed:
                self._next_generation()

    def forget(self, documents: Iterable[str]) -> None:
        """Take out documents."""
        self.record({name: DocumentChunks({}, complete=True) for name in documents})

    def found_again(self, lost: Collection[str], stored: Collection[str]) -> None:
        """Take note that lost chunks were warmed again, all but those that the store did not keep."""
        with self._errors(), self._transaction():
            self._db.executemany(
                "DELETE FROM chunks WHERE scope = ? AND key = ?",
                [(self._scope, key) for key in lost if key not in stored],
            )
            self._next_generation()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_others(self, document: str, kept: Collection[str]) -> int:
        rows = self._rows("SELECT key FROM chunks WHERE scope = ? AND document = ?", self._scope, document)
        gone = [(self._scope, document, key) for (key,) in rows if key not in kept]
        self._db.executemany("DELETE FROM chunks WHERE scope = ? AND document = ? AND key = ?", gone)
        return len(gone)

    def _next_generation(self) -> None:
        self._db.execute("UPDATE ledger SET generation = generation + 1")

    def _rows(self, query: str, *values: str) -> list[tuple[str, ...]]:
        with self._errors():
            return self._db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"can't use the ledger {self._path} ({error}): check free space and permissions, or delete it"
            ) from error
