"""Figures of a few requests, worked out by hand."""

from __future__ import annotations

import statistics
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag.dashboard.figures import (
    Hits,
    Times,
    estimate_prefill,
    first_tokens,
    hits_by_tenant,
    memory_by_process,
    reads_by_tier,
    slowest,
)
from cacheblend_rag.diagnostics.request_log import LoggedRequest, MemoryUse
from cacheblend_rag.stats import BlendStats

from .conftest import blend, prefill, request


def test_hits_add_up() -> None:
    requests = [
        blend(100, 1.0, reused_tokens=60, recomputed_tokens=10, missed_tokens=30, faults=2),
        request(prompt_tokens=50, decision="prefix", prefix_tokens=20, missed_tokens=30),
        prefill(50, 1.0, missed_tokens=50, namespace="legal"),
    ]
    hits = Hits.of(requests)
    assert hits.requests == {"blend": 1, "prefix": 1, "prefill": 1}
    assert hits.faults == 2
    shares = {source: hits.share(source) for source in hits.tokens}
    assert shares == {"reused": 0.3, "prefix": 0.1, "recomputed": 0.05, "missed": 0.55}
    tenants = hits_by_tenant(requests)
    assert list(tenants) == [("a", "default"), ("a", "legal")]
    assert tenants["a", "legal"].tokens.total() == 50
    assert Hits.of([]).share("reused") == 0


def test_times() -> None:
    assert Times.of([3.0]) == Times(1, 3.0, 3.0)
    assert Times.of([4.0, 1.0, 2.0, 3.0]) == Times(4, 2.5, 4.0)
    assert Times.of([float(n) for n in range(1, 101)]).p95 == 95
    assert Times.of([float(n) for n in range(1, 22)]).p95 == 20  # 19 of 21 are less than 95 %


def stats(*requests: LoggedRequest) -> list[BlendStats]:
    return [one.stats for one in requests]


def test_the_estimate_is_length_over_the_median_rate() -> None:
    blends = stats(blend(1000, 0.5), blend(2000, 1.0))
    # 500 and 250 tokens a second near 1000 tokens: 375; of 2000 tokens only the second is within half and double.
    prefills = stats(prefill(600, 1.2), prefill(1500, 6.0))
    found = estimate_prefill(blends, prefills)
    assert found is not None
    assert found.prefills == 2
    assert found.prefill == Times(2, (1000 / 375 + 2000 / 250) / 2, 2000 / 250)
    assert found.blend == Times(2, 0.75, 1.0)


def test_prefills_of_other_lengths_tell_nothing() -> None:
    blends = stats(blend(1000, 0.5), blend(4000, 2.0))
    assert estimate_prefill(blends, stats(prefill(499, 1.0), prefill(8001, 9.0))) is None
    found = estimate_prefill(blends, stats(prefill(500, 1.0), prefill(499, 0.1)))
    assert found is not None
    assert (found.prefill, found.blend, found.prefills) == (Times(1, 2.0, 2.0), Times(1, 0.5, 0.5), 1)
    assert estimate_prefill([], stats(prefill(500, 1.0))) is None
    assert estimate_prefill(blends, []) is None


some = st.lists(st.tuples(st.integers(0, 50), st.floats(0.1, 9)), max_size=12)


@settings(max_examples=100)
@given(some, some)
def test_each_blend_is_estimated_from_the_prefills_near_it(
    blends: list[tuple[int, float]], prefills: list[tuple[int, float]]
) -> None:
    found = estimate_prefill(stats(*(blend(*one) for one in blends)), stats(*(prefill(*one) for one in prefills)))
    near = [[n for n, (p, _) in enumerate(prefills) if p > 0 and b / 2 <= p <= 2 * b] for b, _ in blends]
    if not any(near):
        assert found is None
        return
    rates = [tokens / seconds for tokens, seconds in prefills]
    wanted = [b / statistics.median(rates[n] for n in each) for (b, _), each in zip(blends, near, strict=True) if each]
    assert found is not None
    assert found.prefill == Times.of(wanted)
    assert found.blend == Times.of([seconds for (_, seconds), each in zip(blends, near, strict=True) if each])
    assert found.prefills == len(set().union(*near))


class Counted(float):
    """Counts how often one is compared, or divides."""

    uses = 0

    def __rtruediv__(self, other: float) -> Counted:
        Counted.uses += 1
        return Counted(other / float(self))

    def __lt__(self, other: float) -> bool:
        Counted.uses += 1
        return float(self) < float(other)


def test_the_work_of_an_estimate_grows_with_the_requests_not_with_their_square() -> None:
    count, random = 2000, Random(0)

    def some_stats() -> list[BlendStats]:  # of nearly as many lengths
        return [BlendStats(random.randint(100, 100_000), ttft=Counted(random.uniform(0.1, 9))) for _ in range(count)]

    blends, prefills = some_stats(), some_stats()
    Counted.uses = 0
    found = estimate_prefill(blends, prefills)
    assert found is not None and found.prefill.count > 0.9 * count
    assert count < Counted.uses < 100 * count


def test_first_tokens_are_by_model() -> None:
    found = first_tokens([blend(1000, 1.0), prefill(1000, 4.0, model="b"), request(ttft=0.0, model="c")])
    assert list(found) == ["a", "b"]  # what was lost took no time
    assert found["a"].estimate is None  # another model's rate is not this one's
    assert found["b"].times == {"prefill": Times(1, 4.0, 4.0)}
    assert found["a"].times == {"blend": Times(1, 1.0, 1.0)}


def test_the_slowest_come_first_with_their_parts() -> None:
    requests = [
        request(1.0, ttft=0.5, recompute=0.5),
        request(2.0, ttft=2.0, match=0.5, load=0.25, recompute=1.0),
        request(3.0, ttft=0.0),
    ]
    first, second = slowest(requests)
    assert first.request.time == 2.0
    assert first.parts == {"match": 0.5, "rest": 0.25, "load": 0.25, "recompute": 1.0}
    assert first.share == {"match": 0.25, "rest": 0.125, "load": 0.125, "recompute": 0.5}
    assert second.share == {"recompute": 0.25}  # of the slowest one's time
    assert [one.request.stats.ttft for one in slowest([prefill(9, n) for n in (1.0, 3.0, 2.0)], most=2)] == [3.0, 2.0]
    assert slowest([]) == []


def test_parts_measured_by_two_clocks_stay_in_the_bar() -> None:
    (one,) = slowest([request(ttft=1.0, load=1.5)])
    assert one.share == {"load": 1.0}


def test_reads_are_by_tier() -> None:
    requests = [
        blend(9, 1.0, read_bytes={"disk": 100, "memory": 50}, read_seconds={"disk": 0.5}),
        blend(9, 1.0, read_bytes={"disk": 300}, read_seconds={"disk": 0.5}),
    ]
    found = reads_by_tier(requests)
    assert (found["disk"].nbytes, found["disk"].seconds) == (400, 1.0)
    assert (found["memory"].nbytes, found["memory"].seconds) == (50, 0.0)


def test_memory_is_what_each_process_had_last() -> None:
    requests = [
        request(1.0, process=1, memory=MemoryUse(1, 10, 100)),
        request(2.0, process=2, memory=MemoryUse(2, 20, 100)),
        request(3.0, process=1, memory=MemoryUse(3, 30, 100)),
        request(4.0, process=3),
    ]
    assert [(one.process, one.time, one.use.chunks) for one in memory_by_process(requests)] == [
        (1, 3.0, 3),
        (2, 2.0, 2),
    ]
    assert len(memory_by_process(requests, most=1)) == 1


def test_times_of_nothing_are_refused() -> None:
    with pytest.raises(Exception, match="no median"):
        Times.of([])
