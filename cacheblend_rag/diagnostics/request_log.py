"""A log of requests, one JSON line each, that ``cacheblend dashboard`` shows.

    from cacheblend_rag.diagnostics.request_log import RequestLog

    engine.add_observer(RequestLog(engine, "requests.jsonl"))

It holds how prompts were read, and nothing of what was in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import BlendStats, Decision
from cacheblend_rag.store import DiskStore, MemoryStore, TieredStore

if TYPE_CHECKING:
    from cacheblend_rag.engines.base import Engine

_LEAST_BYTES = 1 << 16
_WAIT_SECONDS = 0.5  # for another process to write its line, which takes microseconds
_MOST = 1 << 53  # numbers in a log: what a float holds exactly
_LATEST = 253_370_764_800.0  # the year 9999: later times can't be shown

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Chunks that one process keeps in memory, in front of a store's directory or in its place.

    Attributes:
        chunks: How many.
        nbytes: Bytes they take.
        max_bytes: Most bytes they may take.
    """

    chunks: int
    nbytes: int
    max_bytes: int


@dataclasses.dataclass(frozen=True)
class LoggedRequest:
    """One line of the log.

    Attributes:
        time: Unix time of the complete answer, in seconds.
        process: Id of the process that answered.
        model: What the engine calls its model.
        namespace: The engine's.
        stats: How the prompt was read.
        memory: What the process keeps in memory; None where that isn't known.
        disk_max_bytes: Most bytes its store keeps on disk; None: no limit, or not known.
    """

    time: float
    process: int
    model: str
    namespace: str
    stats: BlendStats
    memory: MemoryUse | None = None
    disk_max_bytes: int | None = None

    def to_line(self) -> bytes:
        """As one line of JSON, its end included."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":")).encode() + b"\n"

    @staticmethod
    def from_line(line: bytes) -> LoggedRequest:
        """What :meth:`to_line` was made of. Fields that aren't known, of a newer version, are left out.

        Raises:
            ValueError: the line is damaged.
        """
        try:
            fields = json.loads(line)
            memory, limit = fields.get("memory"), fields.get("disk_max_bytes")
            stats = _known(BlendStats(0), fields["stats"])
            if stats["decision"] not in get_args(Decision):
                raise ValueError(f"unknown decision {stats['decision']!r}")
            return LoggedRequest(
                time=min(_checked(fields["time"], float), _LATEST),
                process=_checked(fields["process"], int),
                model=_checked(fields["model"], str),
                namespace=_checked(fields["namespace"], str),
                stats=BlendStats(**stats),
                memory=None if memory is None else MemoryUse(**_known(MemoryUse(0, 0, 0), memory)),
                disk_max_bytes=None if limit is None else _checked(limit, int),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a request: {error}") from error


class RequestLog:
    """Observes one engine: appends a line for each of its answers to a file.

    Any number of engines and processes may append to the same file. Once it holds half of ``max_bytes`` it is renamed
    to ``<path>.1``, in place of the one before, and a new one begins. What can't be written (a full disk, a file that
    a stopped process has locked) is left out, with a warning: answers don't suffer. A lock is waited for up to half a
    second; after a line that was left out, not at all until one could be written again.

    Args:
        engine: Names model and namespace.
        path: The file; made if missing, readable by its owner only.
        max_bytes: Most bytes of the two files together, at least 65,536.

    Raises:
        ConfigError: ``max_bytes`` is too small.
        OSError: the file can't be written.
    """

    def __init__(self, engine: Engine, path: str | os.PathLike[str], max_bytes: int = 16 << 20) -> None:
        if max_bytes < _LEAST_BYTES:
            raise ConfigError(f"max_bytes of a request log must be at least {_LEAST_BYTES}, not {max_bytes}")
        self._engine = engine
        self._path = os.fspath(path)
        self._most = max_bytes // 2
        self._mutex = threading.Lock()
        self._is_failing = False
        os.close(_open(self._path))  # a name that can't be is an error now, not a line lost later

    def __call__(self, stats: BlendStats) -> None:
        """Append a prompt that was read."""
        memory, disk_max_bytes = _limits(self._engine)
        request = LoggedRequest(
            time.time(),
            os.getpid(),
            self._engine.model_name,
            self._engine.scope.namespace,
            stats,
            memory,
            disk_max_bytes,
        )
        with self._mutex:
            try:
                # A process that was stopped while it wrote is waited for by one answer, not by each in turn.
                self._append(request.to_line(), wait=0.0 if self._is_failing else _WAIT_SECONDS)
                self._is_failing = False
            except OSError as error:
                if not self._is_failing:  # once, not with every request
                    _log.warning("requests are not logged to %s: %s", self._path, error)
                self._is_failing = True  # before the next thread has its turn

    def _append(self, line: bytes, wait: float) -> None:
        while True:
            with _locked(self._path, wait) as file:
                size = os.fstat(file).st_size
                if size and size + len(line) > self._most:
                    os.replace(self._path, f"{self._path}.1")
                    continue
                # A writer that was killed leaves a line without its end: ours must not become a part of it.
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = b"\n" + line
                if os.write(file, line) < len(line):
                    os.ftruncate(file, size)
                    raise OSError("the disk is full")
                return


def _known(sample: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a dataclass has, checked against those of a sample."""
    return {name: _checked(fields[name], type(value)) for name, value in vars(sample).items() if name in fields}


def _checked(value: Any, kind: type[Any]) -> Any:
    """A value from JSON, if it is one that is written: text that can be shown, a number that can be reckoned with."""
    if kind is dict:
        return {_checked(key, str): _checked(each, float) for key, each in value.items()}
    is_sound = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if kind is str and is_sound:
        value.encode()  # half of a surrogate pair can be written in JSON, and shown nowhere
    elif is_sound:
        is_sound = 0 <= value < _MOST
    if not is_sound:
        raise ValueError(f"{value!r} in place of {kind.__name__}")
    return value


def _limits(engine: Engine) -> tuple[MemoryUse | None, int | None]:
    """What an engine keeps in memory, and the limit of its disk. vLLM and servers keep theirs to themselves."""
    store = getattr(getattr(engine, "library", None), "store", None)
    memory, disk = (store.memory, store.disk) if isinstance(store, TieredStore) else (store, store)
    use = None
    if isinstance(memory, MemoryStore):
        use = MemoryUse(memory.count, memory.nbytes, memory.max_bytes)
    return use, disk.max_bytes if isinstance(disk, DiskStore) else None


def _open(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def _locked(path: str, wait: float) -> Iterator[int]:
    """The file that has this name, for no other process to write while it is open here; tried once at least."""
    until = time.monotonic() + wait
    while True:
        file = _open(path)
        try:
            if _lock(file) and _is_at(file, path):  # or it was renamed while we waited
                yield file
                return
        finally:
            os.close(file)
        if time.monotonic() >= until:
            raise TimeoutError(f"another process has locked it for {wait:g} s")
        time.sleep(0.001)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
