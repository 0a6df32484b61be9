"""Following a log that grows, is moved, emptied, damaged, or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cacheblend_rag.dashboard import log_reader
from cacheblend_rag.dashboard.log_reader import LogReader

from .conftest import append, request


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def reader(path: Path) -> LogReader:
    return LogReader(path)


def times(reader: LogReader) -> list[float]:
    return [one.time for one in reader.read().requests]


def test_what_is_added_is_seen(path: Path, reader: LogReader) -> None:
    view = reader.read()
    assert (view.requests, view.problem) == ((), f"{path} is not there yet: waiting for its first request")
    append(path, request(1.0))
    assert times(reader) == [1.0]
    line = request(2.0).to_line()
    with path.open("ab", buffering=0) as file:
        file.write(line[:40])
        assert times(reader) == [1.0]  # still being written
        file.write(line[40:])
    assert times(reader) == [1.0, 2.0]
    assert (reader.read().damaged, reader.read().problem) == (0, "")


def test_only_what_is_new_is_read(path: Path, reader: LogReader, monkeypatch: pytest.MonkeyPatch) -> None:
    append(path, request(1.0), request(2.0))
    assert times(reader) == [1.0, 2.0]
    read: list[bytes] = []
    parse = log_reader.LoggedRequest.from_line
    monkeypatch.setattr(
        log_reader.LoggedRequest, "from_line", staticmethod(lambda line: (read.append(line), parse(line))[1])
    )
    append(path, request(3.0))
    assert times(reader) == [1.0, 2.0, 3.0]
    assert len(read) == 1


def test_damaged_lines_are_counted_once(path: Path, reader: LogReader) -> None:
    append(path, request(1.0))
    path.write_bytes(path.read_bytes() + b"\x00\xff\n{}\n" + request(2.0).to_line())
    assert times(reader) == [1.0, 2.0]
    append(path, request(3.0))
    assert times(reader) == [1.0, 2.0, 3.0]
    assert reader.read().damaged == 2


def test_a_log_that_was_moved_is_still_shown(path: Path, reader: LogReader) -> None:
    append(path, request(1.0))
    assert times(reader) == [1.0]
    append(path, request(2.0))
    os.replace(path, f"{path}.1")
    assert times(reader) == [1.0, 2.0]
    append(path, request(3.0))
    assert times(reader) == [1.0, 2.0, 3.0]
    os.replace(path, f"{path}.1")  # those before are gone
    append(path, request(4.0))
    assert times(reader) == [3.0, 4.0]


def test_one_that_was_emptied_begins_anew(path: Path, reader: LogReader) -> None:
    append(path, request(1.0), request(2.0))
    assert len(times(reader)) == 2
    path.write_bytes(b"")
    assert times(reader) == []
    append(path, request(3.0), request(4.0), request(5.0))  # longer than it was: still another file
    assert times(reader) == [3.0, 4.0, 5.0]
    path.write_bytes(b"".join(request(time).to_line() for time in (6.0, 7.0, 8.0, 9.0)))
    assert times(reader) == [6.0, 7.0, 8.0, 9.0]


def test_of_a_long_file_the_end_is_read(path: Path, reader: LogReader, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [request(float(number)).to_line() for number in range(100)]
    path.write_bytes(b"".join(lines))
    monkeypatch.setattr(log_reader, "_MOST_BYTES", len(b"".join(lines[-3:])) + 20)
    assert times(reader) == [97.0, 98.0, 99.0]
    assert reader.read().damaged == 0  # the line that was begun in its middle is not damaged


def test_what_cant_be_read_is_told(tmp_path: Path) -> None:
    assert LogReader(tmp_path).read().problem == f"{tmp_path} can't be read: it is no regular file"
    os.mkfifo(tmp_path / "pipe")
    assert "it is no regular file" in LogReader(tmp_path / "pipe").read().problem  # and it does not wait for a writer
