"""Which chunks on disk are worth waiting for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.store.meter import ReadClock
from cacheblend_rag.vllm.costs import DiskChunk, DiskCosts

disk_chunks = st.lists(
    st.builds(DiskChunk, st.uuids().map(str), st.integers(0, 4096), st.floats(0, 4096)), max_size=8, unique_by=repr
)
seconds_a_token = st.floats(1e-7, 1e-1)


def known(prefill: float, read: float) -> DiskCosts:
    costs = DiskCosts()
    costs.prefill = prefill
    costs.note_read(100, 100 * read)
    return costs


@given(chunks=disk_chunks, prefill=seconds_a_token, read=seconds_a_token)
def test_what_is_waited_for_is_read_sooner_than_prefilled(chunks: list[DiskChunk], prefill: float, read: float) -> None:
    """Each chunk by itself, and all together; and no chunk that is, is left out."""
    slow = known(prefill, read).too_slow(chunks)
    for chunk in chunks:
        assert (chunk.key in slow) == (chunk.to_read * read > chunk.spared * prefill * (1 + 1e-9)) or (
            chunk.to_read * read == pytest.approx(chunk.spared * prefill)
        )


@given(chunks=disk_chunks, lost=st.integers(0, 10**4), prefill=seconds_a_token, read=seconds_a_token)
def test_what_is_lost_with_a_chunk_counts_too(chunks: list[DiskChunk], lost: int, prefill: float, read: float) -> None:
    costs = known(prefill, read)
    alone, slow = costs.too_slow(chunks), costs.too_slow(chunks, lost)
    assert slow in (alone, set())
    if sum(chunk.to_read for chunk in chunks) * read > (sum(chunk.spared for chunk in chunks) + lost) * prefill:
        assert slow == alone


@given(chunks=disk_chunks, most=st.floats(0, 10**4), prefill=seconds_a_token, read=seconds_a_token)
def test_no_longer_is_waited_than_the_whole_blend_gains(
    chunks: list[DiskChunk], most: float, prefill: float, read: float
) -> None:
    costs = known(prefill, read)
    slow = costs.too_slow(chunks, most=most)
    assert slow >= costs.too_slow(chunks)
    waited_for = [chunk for chunk in chunks if chunk.key not in slow]
    assert sum(chunk.to_read for chunk in waited_for) * read <= most * prefill * (1 + 1e-9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, to be set."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


def test_what_is_read_before_counts(clock: list[float]) -> None:
    chunk = DiskChunk("new", 100, 200)
    costs = known(prefill=1.0, read=1.0)
    assert costs.too_slow([chunk]) == set()
    costs.note_asked("a", 60)
    costs.note_asked("b", 50)
    costs.note_asked("b", 50)
    assert (costs.wait, costs.is_coming("b")) == (110, True)
    assert costs.too_slow([chunk]) == {"new"}
    clock[0] += 30  # nothing is heard while the engine is idle: they are being read
    assert costs.wait == 80
    assert costs.too_slow([chunk]) == set()
    costs.note_come("a")
    costs.note_heard()
    assert costs.wait == 50
    clock[0] += 1000  # nothing is heard: but it should have come
    assert costs.wait == 0


def test_what_is_late_is_waited_for_as_long_again(clock: list[float]) -> None:
    costs = known(prefill=1.0, read=0.01)
    costs.note_asked("a", 100)
    clock[0] += 1.5
    costs.note_heard()
    assert costs.wait == 1  # a little late
    clock[0] += 8.5
    costs.note_heard()
    assert costs.wait == 10
    assert costs.too_slow([DiskChunk("a", 0, 9)]) == {"a"}
    assert costs.too_slow([DiskChunk("a", 0, 11)]) == set()
    clock[0] += 100
    costs.note_heard()  # it never comes
    assert (costs.wait, costs.is_coming("a")) == (0, False)


def test_a_stalled_read_is_forgotten_when_others_are_quick(clock: list[float]) -> None:
    """What was asked for meanwhile is expected as the disk is now."""
    costs = known(prefill=1e-3, read=1.0)
    costs.note_asked("a", 1000)
    assert costs.wait == 1000
    for _ in range(16):
        costs.note_read(1000, 0.1)
    assert costs.wait == pytest.approx(0.1)


def test_nothing_is_left_out_as_long_as_too_little_is_known() -> None:
    chunk = DiskChunk("a", 100, 0)
    costs = DiskCosts()
    costs.note_asked("b", 1000)
    assert costs.wait == 0
    assert costs.too_slow([chunk]) == set()
    costs.prefill = 1e-6
    assert costs.too_slow([chunk]) == set()
    costs.note_read(1, 1.0)
    assert costs.too_slow([chunk]) == {"a"}


def test_a_disk_is_judged_by_what_it_did_lately() -> None:
    chunk = DiskChunk("a", 100, 85)
    costs = known(prefill=1e-3, read=1.0)
    assert costs.too_slow([chunk]) == {"a"}
    for _ in range(16):
        costs.note_read(1000, 0.1)
    assert costs.too_slow([chunk]) == set()


def test_threads_that_read_at_once_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = ReadClock()
    assert clock.take() == (0, 0.0)
    clock.begin()
    now = 1.0
    clock.begin()
    now = 3.0
    clock.end(100)
    assert clock.take() == (100, 3.0)
    now = 4.0
    clock.end(0)  # it failed: its time counts with the next one's
    assert clock.take() == (0, 0.0)
    now = 10.0  # nobody reads
    clock.begin()
    now = 12.0
    clock.end(50)
    assert clock.take() == (50, 3.0)
    assert clock.take() == (0, 0.0)


def test_many_threads() -> None:
    clock = ReadClock()
    started = time.perf_counter()

    def read() -> None:
        for _ in range(20):
            clock.begin()
            time.sleep(0.001)
            clock.end(3)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens, seconds = clock.take()
    assert tokens == 8 * 20 * 3
    assert 0.02 <= seconds <= time.perf_counter() - started
