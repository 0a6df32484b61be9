"""Where chunks are kept: in memory, in a directory, or in both."""

from __future__ import annotations

import os
import re
import urllib.parse
import urllib.request
from pathlib import Path

from cacheblend_rag.errors import ConfigError, StoreError
from cacheblend_rag.store.base import ChunkInfo, ChunkStore, IndexedChunk
from cacheblend_rag.store.disk import ChunkCheck, DiskStore
from cacheblend_rag.store.memory import MemoryStore
from cacheblend_rag.store.tiered import TieredStore

__all__ = [
    "ChunkCheck",
    "ChunkInfo",
    "ChunkStore",
    "DiskStore",
    "IndexedChunk",
    "MemoryStore",
    "TieredStore",
    "open_store",
]


def open_store(
    target: str | os.PathLike[str] | None, *, memory_bytes: int = 1 << 30, max_bytes: int | None = None
) -> ChunkStore:
    """Open the store a user named.

    Args:
        target: A directory or ``file://`` URL: chunks are kept there, the ones used lately in memory as well. None: in
            memory only.
        memory_bytes: Most bytes kept in memory; 0 with a directory reads the disk every time.
        max_bytes: Most bytes kept in the directory; None: no limit.

    Raises:
        ConfigError: a limit out of its range, or a URL of a kind that isn't supported.
        StoreError: the directory can't be opened.
    """
    if memory_bytes < 0:
        raise ConfigError(f"memory_bytes must be 0 or more, not {memory_bytes}")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes must be at least 1, or None for no limit, not {max_bytes}")
    if target is None:
        return MemoryStore(memory_bytes)
    disk = DiskStore(_directory(os.fspath(target)), max_bytes)
    return TieredStore(MemoryStore(memory_bytes), disk) if memory_bytes else disk


def is_anything_in(directory: Path) -> bool:
    """Whether there is a directory, with something in it, which may be a store.

    Raises:
        StoreError: it can't be read.
    """
    try:
        return directory.is_dir() and any(directory.iterdir())
    except OSError as error:
        raise StoreError(f"{directory} can't be read ({error.strerror or error}); check its permissions") from error


def _directory(target: str) -> Path:
    if not target:
        raise ConfigError("the store's directory is empty; name one, or None to keep chunks in memory")
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", target):
        return Path(target).expanduser()
    url = urllib.parse.urlsplit(target)
    if url.scheme != "file" or url.netloc not in ("", "localhost") or not url.path:
        raise ConfigError(f"can't open a store at {target}: supported are a directory and file:///absolute/path")
    return Path(urllib.request.url2pathname(url.path))
