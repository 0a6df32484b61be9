"""From a directory of documents to warm chunks: find, read, split, warm, and keep the catalogue in step.

Ingesting again is how to go on after an interruption and how to follow a corpus that changed: files that are done cost
a hash, chunks that are warm are skipped, and chunks whose text is gone are evicted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cacheblend_rag.errors import ConfigError, IngestError
from cacheblend_rag.reading import SUFFIXES, read_text

if TYPE_CHECKING:
    from cacheblend_rag.catalog import Catalog
    from cacheblend_rag.engines.base import Engine


@dataclasses.dataclass(frozen=True)
class BadFile:
    """A file or directory that was left out.

    Attributes:
        path: Which.
        reason: Why, in a few words.
    """

    path: str
    reason: str


@dataclasses.dataclass
class IngestReport:
    """What ingesting a directory did.

    Attributes:
        files: Files whose chunks are all warm now.
        removed: Files that were ingested once and are gone from the directory.
        stored: Chunks prefilled and stored.
        already_there: Chunks that were warm.
        evicted: Chunks of changed and removed files that were evicted.
        tokens: Tokens prefilled.
        bytes: Bytes written.
        seconds: Wall time.
        bad: What could not be read; chunks ingested from it before stay.
    """

    files: int = 0
    removed: int = 0
    stored: int = 0
    already_there: int = 0
    evicted: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    bad: list[BadFile] = dataclasses.field(default_factory=list)


class IngestProgress(NamedTuple):
    """How far an ingestion is.

    Attributes:
        files_done: Files dealt with.
        files: Files in all.
        file: The file at work.
        chunks_done: Its chunks that are warm.
        chunks: Its chunks in all, 0 before it is split.
    """

    files_done: int
    files: int
    file: str
    chunks_done: int
    chunks: int


Progress = Callable[[IngestProgress], None]


def ingest(
    engine: Engine,
    directory: str | os.PathLike[str],
    catalog: Catalog,
    *,
    chunk_tokens: int = 256,
    progress: Progress | None = None,
) -> IngestReport:
    """Warm every text, Markdown, HTML and PDF file under a directory and record their texts in the catalogue.

    Files that can't be read or hold no text are reported, and the others ingested all the same.

    Args:
        engine: Warms the chunks.
        directory: Searched recursively; names that start with a dot are skipped.
        catalog: Of the engine's scope.
        chunk_tokens: Most tokens a chunk may have.
        progress: Called before each file and after each chunk.

    Raises:
        IngestError: the directory can't be read or holds no text.
        ConfigError: ``chunk_tokens`` is below 1.
        ChunkTooLongError: ``chunk_tokens`` does not fit the model's context.
        StoreError: the store can't be written; what was stored stays, and ingesting again goes on from there.
    """
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be at least 1, not {chunk_tokens!r}")
    began = time.perf_counter()
    root = Path(directory).resolve()
    files, bad = find_files(root)
    if not files and not bad:
        raise IngestError(f"{directory} holds no files to ingest ({', '.join(SUFFIXES)})")

    report = IngestReport(bad=bad)
    for done, path in enumerate(files):
        tell = partial(_tell, progress, done, len(files), str(path))
        tell(0, 0)
        try:
            text = read_text(path)
        except IngestError as error:
            bad.append(BadFile(str(path), str(error)))
            continue
        _ingest_file(engine, path, text, catalog, chunk_tokens, tell, report)
    _remove_gone(engine, root, files, catalog, report)

    if not report.stored + report.already_there and not bad:
        raise IngestError(f"all files in {directory} are empty ({len(files)} found): there is nothing to ingest")
    report.seconds = time.perf_counter() - began
    return report


def find_files(root: Path) -> tuple[list[Path], list[BadFile]]:
    """The files to ingest under a directory, sorted, and the subdirectories that can't be listed.

    Hidden files and directories are skipped, links to directories are not followed.

    Raises:
        IngestError: the directory itself is missing, no directory, or can't be listed.
    """
    files: list[Path] = []
    bad: list[BadFile] = []

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == root:
            raise IngestError(f"can't read the directory {root}: {error.strerror}") from error
        bad.append(BadFile(str(error.filename), str(error.strerror)))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
    return sorted(files), bad


def split(text: str, suffix: str, chunk_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Split a text into chunks of at most ``chunk_tokens`` tokens, at headings, paragraphs and sentences where it can.

    Args:
        text: What to split.
        suffix: ``".md"`` splits by Markdown structure, anything else as plain text.
        chunk_tokens: Most tokens of a chunk.
        count_tokens: Tokens in a text.

    Returns:
        The chunks, none blank, without the white space around them.
    """
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

    splitter = MarkdownSplitter if suffix == ".md" else TextSplitter
    return splitter.from_callback(count_tokens, chunk_tokens).chunks(text)


def read_chunks(path: str | os.PathLike[str], chunk_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """The chunks of a file, exactly the texts that :func:`ingest` warms: put them in prompts as they are.

    Args:
        path: The file.
        chunk_tokens: Most tokens of a chunk, as given to ``ingest``.
        count_tokens: The engine's.

    Raises:
        IngestError: see :func:`cacheblend_rag.reading.read_text`.
    """
    return split(read_text(path), Path(path).suffix.lower(), chunk_tokens, count_tokens)


def _ingest_file(
    engine: Engine,
    path: Path,
    text: str,
    catalog: Catalog,
    chunk_tokens: int,
    tell: Callable[[int, int], None],
    report: IngestReport,
) -> None:
    source = str(path)
    # The digest covers all that the chunks depend on: with another chunk size the file counts as changed.
    digest = hashlib.blake2b(f"{chunk_tokens}:{text}".encode(), digest_size=16).hexdigest()
    if catalog.digest(source) == digest:
        chunks = catalog.texts(source)
    else:
        chunks = split(text, path.suffix.lower(), chunk_tokens, engine.count_tokens)
        # Evicting comes before the catalogue forgets the old texts, so that after a crash in between it is done again.
        report.evicted += engine.evict([old for old in catalog.exclusive_texts(source) if old not in set(chunks)])
        catalog.begin(source, chunks)

    warmed = engine.warm(chunks, progress=tell)  # also when nothing changed: chunks may have been evicted meanwhile
    catalog.finish(source, digest)
    report.files += 1
    report.stored += warmed.stored
    report.already_there += warmed.already_there
    report.tokens += warmed.tokens
    report.bytes += warmed.bytes


def _remove_gone(engine: Engine, root: Path, files: list[Path], catalog: Catalog, report: IngestReport) -> None:
    present = {str(path) for path in files}
    unlisted = [Path(bad.path) for bad in report.bad]  # what lies below an unreadable directory may still be there
    for source in catalog.sources():
        path = Path(source)
        if path.is_relative_to(root) and source not in present and not any(map(path.is_relative_to, unlisted)):
            report.evicted += engine.evict(catalog.exclusive_texts(source))
            catalog.remove(source)
            report.removed += 1


def _tell(progress: Progress | None, done: int, files: int, file: str, chunks_done: int, chunks: int) -> None:
    if progress is not None:
        progress(IngestProgress(done, files, file, chunks_done, chunks))
