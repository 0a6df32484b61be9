"""Follows a request log while others write it."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO

from cacheblend_rag.diagnostics.request_log import LoggedRequest

NEWEST = 10_000
"""Requests that are kept, of each of the two files: what figures are of."""

_MOST_BYTES = 16 << 20  # read at once: of a longer file, its end
_HEAD_BYTES = 64  # by which a file is known again; the time of its first line is in them


@dataclasses.dataclass(frozen=True)
class LogView:
    """What is known of a log now.

    Attributes:
        requests: By time, the newest last.
        damaged: Lines that could not be read as a request, and were skipped.
        problem: Why there is nothing new to be read; empty if there is no problem.
    """

    requests: tuple[LoggedRequest, ...] = ()
    damaged: int = 0
    problem: str = ""


class LogReader:
    """Reads a request log and the one before it; each time only what was added. Threads may share it.

    Args:
        path: The log. It need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()
        self._files: dict[tuple[int, int], _File] = {}

    def read(self) -> LogView:
        """What the log holds now. What can't be read is told in the view."""
        with self._mutex:
            problem, files = "", {}
            # The newer first: one that is moved meanwhile is then read twice, not left out.
            for path in (self.path, Path(f"{self.path}.1")):
                try:
                    key, file = self._follow(path)
                    files[key] = file
                except FileNotFoundError:
                    if path == self.path:
                        problem = f"{path} is not there yet: waiting for its first request"
                except OSError as error:
                    problem = f"{path} can't be read: {error.strerror or error}"
            self._files = files
            requests = [request for file in files.values() for request in file.requests]
            damaged = sum(file.damaged for file in files.values())
        return LogView(tuple(sorted(requests, key=lambda request: request.time)), damaged, problem)

    def _follow(self, path: Path) -> tuple[tuple[int, int], _File]:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep us waiting
            raise OSError("it is no regular file")
        with path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            key = (status.st_dev, status.st_ino)
            file, head = self._files.get(key, _File()), opened.read(_HEAD_BYTES)
            if status.st_size < file.offset or not head.startswith(file.head):
                file = _File()  # somebody emptied it, or its number was given to another file
            file.head = head
            file.read_on(opened, status.st_size)
        return key, file


class _File:
    """What was read of one file."""

    def __init__(self) -> None:
        self.head = b""
        self.offset = 0
        self.damaged = 0
        self.requests: deque[LoggedRequest] = deque(maxlen=NEWEST)

    def read_on(self, opened: BinaryIO, size: int) -> None:
        begin = max(self.offset, size - _MOST_BYTES)
        opened.seek(begin)
        data = opened.read(size - begin)
        if begin > self.offset:  # into the middle of a line
            data = data[data.find(b"\n") + 1 :]
        end = data.rfind(b"\n") + 1  # what follows is still being written
        self.offset = size - (len(data) - end)
        for line in data[:end].splitlines():
            try:
                self.requests.append(LoggedRequest.from_line(line))
            except ValueError:
                self.damaged += 1
