"""The log of requests: what is written is read again, by whomever it is written, and whatever happens to the file."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import multiprocessing
import os
import stat
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag.dashboard.log_reader import LogReader
from cacheblend_rag.diagnostics import request_log
from cacheblend_rag.diagnostics.request_log import LoggedRequest, MemoryUse, RequestLog
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.store import DiskStore, MemoryStore, TieredStore

from .conftest import append, chunk, engine, request

text = st.text(st.characters(exclude_categories=["Cs"]))
count, seconds = st.integers(0, 2**53 - 1), st.floats(0, 1e12)
by_name = {"int": count, "float": seconds, "str": text, "Decision": st.sampled_from(["blend", "prefix", "prefill"])}
stats = st.builds(
    BlendStats,
    **{
        field.name: by_name.get(str(field.type), st.dictionaries(text, seconds, max_size=2))
        for field in dataclasses.fields(BlendStats)
    },
)
memory = st.none() | st.builds(MemoryUse, count, count, count)
requests = st.builds(LoggedRequest, st.floats(0, 1e11), count, text, text, stats, memory, st.none() | count)


@settings(max_examples=50)
@given(requests)
def test_a_line_is_the_request(one: LoggedRequest) -> None:
    line = one.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert LoggedRequest.from_line(line) == one


@settings(max_examples=50)
@given(requests, st.data())
def test_a_damaged_line_is_refused_or_a_request(one: LoggedRequest, data: st.DataObject) -> None:
    line = bytearray(one.to_line())
    for _ in range(data.draw(st.integers(1, 4))):
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(line[: data.draw(st.integers(0, len(line)))])
    try:
        found = LoggedRequest.from_line(cut)
    except ValueError:
        return
    assert found.stats.ttft >= 0 and found.stats.decision in ("blend", "prefix", "prefill")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"3",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"time":1,"process":1,"model":"a","namespace":"b","stats":{}}',
        request(1.0).to_line().replace(b'"ttft":1.0', b'"ttft":NaN'),
        request(1.0).to_line().replace(b'"ttft":1.0', b'"ttft":-1'),
        request(1.0).to_line().replace(b'"ttft":1.0', b'"ttft":"1"'),
        request(1.0).to_line().replace(b'"ttft":1.0', b'"ttft":true'),
        request(1.0).to_line().replace(b'"prompt_tokens":100', b'"prompt_tokens":1e400'),
        request(1.0).to_line().replace(b'"prefill"', b'"guess"'),
        request(1.0).to_line().replace(b'"model":"a"', b'"model":"\\ud800"'),
    ],
)
def test_lines_that_are_no_requests(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a request"):
        LoggedRequest.from_line(line)


def test_fields_of_a_newer_version_are_left_out() -> None:
    fields = json.loads(request(1.0).to_line())
    newer = {**fields, "colour": "red", "stats": {**fields["stats"], "entropy": [1]}}
    assert LoggedRequest.from_line(json.dumps(newer).encode()) == request(1.0)


def test_a_line_names_the_engine_and_its_store(tmp_path: Path) -> None:
    store = TieredStore(MemoryStore(1 << 20), DiskStore(tmp_path / "store", max_bytes=5 << 20))
    store.put(chunk(30))
    log = RequestLog(engine("a model", "legal", store), tmp_path / "log")
    stats = request().stats
    log(stats)
    (one,) = LogReader(tmp_path / "log").read().requests
    assert (one.model, one.namespace, one.process, one.stats) == ("a model", "legal", os.getpid(), stats)
    kept = next(iter(store.memory.entries())).nbytes
    assert (one.memory, one.disk_max_bytes) == (MemoryUse(1, kept, 1 << 20), 5 << 20)
    RequestLog(engine(), tmp_path / "log")(stats)
    assert LogReader(tmp_path / "log").read().requests[1].memory is None
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def test_an_answer_does_not_list_what_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore(1 << 20)
    for tokens in (30, 40):
        store.put(chunk(tokens))
    nbytes = sum(entry.nbytes for entry in store.entries())
    monkeypatch.delattr(MemoryStore, "entries")
    RequestLog(engine(store=store), tmp_path / "log")(request().stats)
    assert LogReader(tmp_path / "log").read().requests[0].memory == MemoryUse(2, nbytes, 1 << 20)


def test_its_size_is_bounded_and_the_newest_are_kept(tmp_path: Path) -> None:
    path, most = tmp_path / "log", 1 << 16
    log = RequestLog(engine(), path, max_bytes=most)
    for number in range(400):
        log(request(prompt_tokens=number).stats)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= most
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1"]
    kept = [one.stats.prompt_tokens for one in LogReader(path).read().requests]
    assert kept == list(range(400 - len(kept), 400))
    assert len(kept) > 50


def write_many(path: Path, process: int, most: int) -> None:
    log = RequestLog(engine(f"process {process}"), path, max_bytes=most)
    for number in range(300):
        log(request(prompt_tokens=number).stats)


@pytest.mark.parametrize("most", [1 << 16, 1 << 30])
def test_processes_write_side_by_side(tmp_path: Path, most: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, number, most)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    view = LogReader(path).read()
    assert view.damaged == 0
    for number in range(4):  # only what was moved out by others is gone: the oldest
        kept = [one.stats.prompt_tokens for one in view.requests if one.model == f"process {number}"]
        assert kept == list(range(300 - len(kept), 300))
        assert most < 1 << 30 or len(kept) == 300


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, request(1.0))
    with path.open("ab") as file:
        file.write(request(2.0).to_line()[:50])  # its writer was killed
    RequestLog(engine(), path)(request().stats)
    view = LogReader(path).read()
    assert (len(view.requests), view.damaged) == (2, 1)


def test_a_full_disk_costs_lines_not_answers(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(engine(), "/dev/full")
    for _ in range(3):
        log(request().stats)
    assert [record.message for record in caplog.records] == [
        "requests are not logged to /dev/full: [Errno 28] No space left on device"
    ]


def test_half_a_line_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, write = tmp_path / "log", os.write
    log = RequestLog(engine(), path)
    log(request().stats)
    before = path.read_bytes()
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:50]))
    log(request().stats)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert "the disk is full" in caplog.text
    log(request().stats)
    assert len(LogReader(path).read().requests) == 2


def test_a_lock_that_is_never_released_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(request_log, "_WAIT_SECONDS", 0.02)
    path = tmp_path / "log"
    log = RequestLog(engine(), path)
    with path.open("rb") as file, caplog.at_level(logging.WARNING):
        fcntl.flock(file, fcntl.LOCK_EX)
        log(request().stats)
    assert "another process has locked it" in caplog.text
    log(request().stats)
    assert len(LogReader(path).read().requests) == 1


def test_a_lock_that_is_never_released_delays_one_answer_not_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, lock, tries = tmp_path / "log", request_log._lock, Counter[int]()

    def counted_lock(file: int) -> bool:
        tries[threading.get_ident()] += 1
        return lock(file)

    monkeypatch.setattr(request_log, "_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(request_log, "_lock", counted_lock)
    log, together = RequestLog(engine(), path), threading.Barrier(4)

    def answer(number: int) -> None:
        together.wait()
        log(request(prompt_tokens=number).stats)

    for _ in range(2):  # once it could be had again, it is waited for again
        tries.clear()
        with path.open("rb") as file, ThreadPoolExecutor(4) as pool:
            fcntl.flock(file, fcntl.LOCK_EX)
            list(pool.map(answer, range(4)))
            first, *others = sorted(tries.values(), reverse=True)
            assert first > 1 and others == [1, 1, 1]
        log(request(prompt_tokens=9).stats)
    assert [one.stats.prompt_tokens for one in LogReader(path).read().requests] == [9, 9]
    assert len(caplog.records) == 2


def test_a_line_never_goes_to_a_file_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "log", request_log._lock
    log = RequestLog(engine(), path)
    log(request(prompt_tokens=1).stats)

    def lock_late(file: int) -> bool:
        if not Path(f"{path}.1").exists():
            os.replace(path, f"{path}.1")  # by another process, once this one has opened it
        return lock(file)

    monkeypatch.setattr(request_log, "_lock", lock_late)
    log(request(prompt_tokens=2).stats)
    assert [len(file.read_bytes().splitlines()) for file in (path, Path(f"{path}.1"))] == [1, 1]
    assert LoggedRequest.from_line(path.read_bytes()).stats.prompt_tokens == 2


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 65536, not 5"):
        RequestLog(engine(), tmp_path / "log", max_bytes=5)
    with pytest.raises(FileNotFoundError):
        RequestLog(engine(), tmp_path / "nowhere" / "log")
    with pytest.raises(IsADirectoryError):
        RequestLog(engine(), tmp_path)
