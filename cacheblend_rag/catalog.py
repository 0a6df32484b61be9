"""Which texts a store's corpus holds, and lexical retrieval over them.

The catalogue is one SQLite file beside the chunks. It holds text only; whether a text's KV is warm is the store's
business, so a catalogue that lags behind the store costs a cache miss and never a wrong answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import sqlite3
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cacheblend_rag.errors import StoreError

if TYPE_CHECKING:
    from cacheblend_rag.chunks import ChunkScope

FILE_NAME = "catalog.sqlite"

_SCHEMA_VERSION = 1
_BUSY_SECONDS = 60.0

# The full-text index reads its texts from `passages` and follows it by triggers. Porter stemming lets "bridges" find
# "bridge"; accents are ignored.
_SCHEMA = (
    """CREATE TABLE documents (
        id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, scope TEXT NOT NULL, source TEXT NOT NULL, digest TEXT,
        UNIQUE (scope, source))""",
    """CREATE TABLE passages (
        id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents (id) ON DELETE CASCADE,
        position INTEGER NOT NULL, text TEXT NOT NULL)""",
    "CREATE INDEX passages_by_document ON passages (document)",
    "CREATE INDEX passages_by_text ON passages (text)",
    """CREATE VIRTUAL TABLE words USING fts5 (
        text, content = 'passages', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2')""",
    """CREATE TRIGGER passage_added AFTER INSERT ON passages BEGIN
        INSERT INTO words (rowid, text) VALUES (new.id, new.text);
    END""",
    """CREATE TRIGGER passage_removed AFTER DELETE ON passages BEGIN
        INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
    END""",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)


@dataclasses.dataclass(frozen=True)
class Passage:
    """A retrieved text.

    Attributes:
        text: Exactly as it was warmed.
        source: The document it is from.
        position: Its place among the document's passages, from 0.
        score: BM25; larger is better.
    """

    text: str
    source: str
    position: int
    score: float


class Catalog:
    """The documents of one scope and their passages. For one thread; any number of processes may share the file.

    A document is first recorded with :meth:`begin`, then its passages are warmed, then :meth:`finish` marks it done: a
    process that dies in between leaves a document whose :meth:`digest` is None, to be done again.

    Args:
        directory: The store's directory.
        scope: Whose documents these are: the same corpus is another one for another model or namespace.

    Raises:
        StoreError: the file can't be opened or written, or is not a catalogue. Every method may raise it.
    """

    def __init__(self, directory: str | os.PathLike[str], scope: ChunkScope) -> None:
        self._path = Path(directory) / FILE_NAME
        self._namespace = scope.namespace
        self._scope = scope.digest
        self._connection = _open(self._path)

    def sources(self) -> list[str]:
        """All documents, finished or not, sorted."""
        with _errors_of(self._path):
            rows = self._connection.execute(
                "SELECT source FROM documents WHERE scope = ? ORDER BY source", (self._scope,)
            )
            return [source for (source,) in rows]

    def digest(self, source: str) -> str | None:
        """The digest a document was finished with; None if it is unknown or unfinished."""
        with _errors_of(self._path):
            row = self._connection.execute(
                "SELECT digest FROM documents WHERE scope = ? AND source = ?", (self._scope, source)
            ).fetchone()
        return None if row is None else row[0]

    def texts(self, source: str) -> list[str]:
        """A document's passages in order."""
        with _errors_of(self._path):
            rows = self._connection.execute(
                "SELECT text FROM passages JOIN documents ON documents.id = document"
                " WHERE scope = ? AND source = ? ORDER BY position",
                (self._scope, source),
            )
            return [text for (text,) in rows]

    def exclusive_texts(self, source: str) -> list[str]:
        """A document's passages that no other document of the scope holds."""
        with _errors_of(self._path):
            rows = self._connection.execute(
                "SELECT DISTINCT text FROM passages AS mine JOIN documents AS my ON my.id = mine.document"
                " WHERE my.scope = ?1 AND my.source = ?2 AND NOT EXISTS ("
                "  SELECT 1 FROM passages AS other JOIN documents AS their ON their.id = other.document"
                "  WHERE other.text = mine.text AND their.scope = ?1 AND their.source != ?2)"
                " ORDER BY position",
                (self._scope, source),
            )
            return [text for (text,) in rows]

    def begin(self, source: str, texts: Sequence[str]) -> None:
        """Record a document's passages in place of those it had, as not finished."""
        with _errors_of(self._path), _transaction(self._connection):
            self._forget(source)
            document = self._connection.execute(
                "INSERT INTO documents (namespace, scope, source) VALUES (?, ?, ?)",
                (self._namespace, self._scope, source),
            ).lastrowid
            self._connection.executemany(
                "INSERT INTO passages (document, position, text) VALUES (?, ?, ?)",
                [(document, position, text) for position, text in enumerate(texts)],
            )

    def finish(self, source: str, digest: str) -> None:
        """Mark a document as done."""
        with _errors_of(self._path), _transaction(self._connection):
            self._connection.execute(
                "UPDATE documents SET digest = ? WHERE scope = ? AND source = ?", (digest, self._scope, source)
            )

    def remove(self, source: str) -> None:
        """Forget a document and its passages."""
        with _errors_of(self._path), _transaction(self._connection):
            self._forget(source)

    def search(self, question: str, top_k: int) -> list[Passage]:
        """The passages that share words with a question, best first by BM25, at most ``top_k``, none twice.

        Any word may match; punctuation and FTS5 operators in the question are nothing special. Words are runs of
        letters and digits, so a language written without spaces matches whole runs only.
        """
        found: dict[str, Passage] = {}
        with _errors_of(self._path):
            rows = self._connection.execute(
                "SELECT passages.text, source, position, bm25(words) AS rank FROM words"
                " JOIN passages ON passages.id = words.rowid JOIN documents ON documents.id = document"
                " WHERE words MATCH ? AND scope = ? ORDER BY rank, source, position",
                (_any_word_of(question), self._scope),
            )
            for text, source, position, rank in rows:
                if len(found) == top_k:
                    break
                found.setdefault(text, Passage(text, source, position, score=-rank))
        return list(found.values())

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self, source: str) -> None:
        self._connection.execute("DELETE FROM documents WHERE scope = ? AND source = ?", (self._scope, source))


def forget_documents(directory: str | os.PathLike[str], namespace: str | None = None) -> int:
    """Remove all documents of a namespace (None: of every one), whatever the model; returns how many there were.

    Raises:
        StoreError: the catalogue can't be written.
    """
    path = Path(directory) / FILE_NAME
    if not path.exists():
        return 0
    with contextlib.closing(_open(path)) as connection, _errors_of(path), _transaction(connection):
        return connection.execute("DELETE FROM documents WHERE ?1 IS NULL OR namespace = ?1", (namespace,)).rowcount


def _any_word_of(question: str) -> str:
    """An FTS5 expression that matches any word of a text: ``"who" OR "is" OR "near"``."""
    # Marks stay with their letters: FTS5 reads "e" + U+0301 as one letter. What is left holds no quotes to escape.
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in question)
    return " OR ".join(f'"{word}"' for word in dict.fromkeys(kept.split())) or '""'


def _open(path: Path) -> sqlite3.Connection:
    with _errors_of(path), _exclusively(path.with_suffix(".lock")):
        _touch(path)  # texts are as private as their KV
        # Autocommit: transactions are opened where they are meant, see _transaction.
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last documents, no more
            connection.execute("PRAGMA foreign_keys = ON")
            _create_schema(path, connection)
        except BaseException:
            connection.close()
            raise
        return connection


@contextlib.contextmanager
def _exclusively(lock: Path) -> Iterator[None]:
    """One process at a time: SQLite does not wait for others where it changes a new file to WAL, it fails at once."""
    _touch(lock)
    with lock.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _touch(path: Path) -> None:
    # Only a new file is opened: closing one that SQLite has open would drop the locks it holds (POSIX).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _create_schema(path: Path, connection: sqlite3.Connection) -> None:
    if _version(connection) == _SCHEMA_VERSION:
        return
    with _transaction(connection):
        version = _version(connection)  # another process may have been first
        if version == 0:
            for statement in _SCHEMA:
                connection.execute(statement)
        elif version != _SCHEMA_VERSION:
            raise StoreError(
                f"{path} has format {version}, this version reads {_SCHEMA_VERSION}: use the version that wrote it,"
                " or delete the file and ingest again"
            )


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE takes the write lock at once, waiting for other writers; a read lock could not be raised to one later.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # SQLite rolls back by itself on a full disk
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except sqlite3.OperationalError as error:
        raise StoreError(f"can't use the catalogue {path}: {error}; check free space and permissions") from error
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path} is damaged ({error}): delete it and ingest again") from error
    except OSError as error:
        raise StoreError(f"can't open the catalogue {path}: {error.strerror}") from error
