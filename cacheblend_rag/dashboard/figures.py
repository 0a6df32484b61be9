"""From requests to figures: what was reused, how long the first token took, and what plain prefill may have taken."""

from __future__ import annotations

import bisect
import dataclasses
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from cacheblend_rag.diagnostics.request_log import LoggedRequest, MemoryUse
from cacheblend_rag.diagnostics.timeline import parts_of
from cacheblend_rag.stats import BlendStats

SOURCES = ("reused", "prefix", "recomputed", "missed")
"""Where the KV of a prompt's tokens came from: fields of BlendStats, those that cost little first."""

_NEAR = 2.0  # times longer or shorter: prompts whose tokens take about as long


@dataclasses.dataclass(frozen=True)
class Hits:
    """How some prompts were read.

    Attributes:
        requests: How many there were, by decision.
        tokens: Their tokens, by source.
        faults: Matched chunks that could not be read.
    """

    requests: Counter[str]
    tokens: Counter[str]
    faults: int

    @staticmethod
    def of(requests: Iterable[LoggedRequest]) -> Hits:
        """Count them."""
        decisions: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        faults = 0
        for request in requests:
            decisions[request.stats.decision] += 1
            faults += request.stats.faults
            tokens.update({source: getattr(request.stats, f"{source}_tokens") for source in SOURCES})
        return Hits(decisions, tokens, faults)

    def share(self, source: str) -> float:
        """Of all prompt tokens, those from one source; 0 where there are none."""
        return self.tokens[source] / max(self.tokens.total(), 1)


def hits_by_tenant(requests: Iterable[LoggedRequest]) -> dict[tuple[str, str], Hits]:
    """Hits by model and namespace, in the order of their names."""
    groups: dict[tuple[str, str], list[LoggedRequest]] = {}
    for request in requests:
        groups.setdefault((request.model, request.namespace), []).append(request)
    return {key: Hits.of(groups[key]) for key in sorted(groups)}


@dataclasses.dataclass(frozen=True)
class Times:
    """Some times, in seconds.

    Attributes:
        count: How many.
        median: The one in the middle, or the mean of both.
        p95: The least that 95 % of them don't exceed.
    """

    count: int
    median: float
    p95: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Times:
        """Of at least one."""
        return Times(len(seconds), statistics.median(seconds), sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What plain prefill may have taken in place of blends, from plain prefills of prompts about as long.

    Attributes:
        prefill: The estimates.
        blend: What the same blends took.
        prefills: Plain prefills that the estimates are from.
    """

    prefill: Times
    blend: Times
    prefills: int


@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """Times to first token with one model.

    Attributes:
        times: By decision; one that was never made is left out.
        estimate: None where there is no blend, or no plain prefill of a prompt about as long.
    """

    times: dict[str, Times]
    estimate: Estimate | None


def first_tokens(requests: Iterable[LoggedRequest]) -> dict[str, FirstTokens]:
    """Times to first token by model, in the order of their names. Requests whose times were lost are left out."""
    models: dict[str, dict[str, list[BlendStats]]] = {}
    for request in requests:
        if request.stats.ttft > 0:
            models.setdefault(request.model, {}).setdefault(request.stats.decision, []).append(request.stats)
    return {
        model: FirstTokens(
            {decision: Times.of([one.ttft for one in stats]) for decision, stats in sorted(decisions.items())},
            estimate_prefill(decisions.get("blend", []), decisions.get("prefill", [])),
        )
        for model, decisions in sorted(models.items())
    }


def estimate_prefill(blends: Sequence[BlendStats], prefills: Sequence[BlendStats]) -> Estimate | None:
    """What plain prefill may have taken in place of blends of one model; None if nothing can be said.

    A blend's estimate is the length of its prompt over the median rate, in tokens a second, of the plain prefills of
    prompts from half to twice as long: short prompts have few tokens to share what every request takes, and in long
    ones each token reads more. A blend without such prefills has no estimate.
    """
    by_length = sorted(prefills, key=lambda stats: stats.prompt_tokens)
    lengths = [stats.prompt_tokens for stats in by_length]
    rates = [stats.prompt_tokens / stats.ttft for stats in by_length]
    begin = end = used = 0
    near: list[float] = []  # rates[begin:end], sorted
    estimates, times = [], []
    # From blend to blend the window only moves on to longer prompts: each prefill enters it once and leaves it once.
    for stats in sorted(blends, key=lambda stats: stats.prompt_tokens):
        first = bisect.bisect_left(lengths, max(stats.prompt_tokens / _NEAR, 1))
        behind = bisect.bisect_right(lengths, stats.prompt_tokens * _NEAR)
        for rate in rates[begin : min(first, end)]:
            del near[bisect.bisect_left(near, rate)]
        for rate in rates[max(first, end) : behind]:
            bisect.insort(near, rate)
        used += behind - max(first, end)
        begin, end = first, behind
        if near:
            median = (near[(len(near) - 1) // 2] + near[len(near) // 2]) / 2
            estimates.append(stats.prompt_tokens / median)
            times.append(stats.ttft)
    return Estimate(Times.of(estimates), Times.of(times), used) if estimates else None


@dataclasses.dataclass(frozen=True)
class SlowRequest:
    """A request with the parts of its time to first token.

    Attributes:
        request: The request.
        parts: Seconds by part, in order; those that took no time are left out.
        share: Of the slowest one's time, by part.
    """

    request: LoggedRequest
    parts: dict[str, float]
    share: dict[str, float]


def slowest(requests: Iterable[LoggedRequest], most: int = 10) -> list[SlowRequest]:
    """Those with the longest times to first token, the slowest first."""
    chosen = sorted(requests, key=lambda request: request.stats.ttft, reverse=True)[:most]
    parts = [{name: part for name, part in parts_of(one.stats).items() if part > 0} for one in chosen]
    longest = max((sum(each.values()) for each in parts), default=0.0)
    return [
        SlowRequest(request, each, {name: seconds / longest for name, seconds in each.items()})
        for request, each in zip(chosen, parts, strict=True)
        if each
    ]


@dataclasses.dataclass(frozen=True)
class TierReads:
    """Chunks that prompts read from one tier.

    Attributes:
        nbytes: Their bytes.
        seconds: What reading them took.
    """

    nbytes: int
    seconds: float


def reads_by_tier(requests: Iterable[LoggedRequest]) -> dict[str, TierReads]:
    """What prompts read, by tier."""
    nbytes: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for request in requests:
        nbytes.update(request.stats.read_bytes)
        for tier, each in request.stats.read_seconds.items():
            seconds[tier] += each
    return {tier: TierReads(count, seconds[tier]) for tier, count in sorted(nbytes.items())}


@dataclasses.dataclass(frozen=True)
class ProcessMemory:
    """What one process kept in memory when it last answered.

    Attributes:
        process: Its id.
        time: When that was, Unix seconds.
        use: What it kept.
    """

    process: int
    time: float
    use: MemoryUse


def memory_by_process(requests: Sequence[LoggedRequest], most: int = 5) -> list[ProcessMemory]:
    """Processes that answered last, each with what it kept in memory then. Requests are by time."""
    last = {one.process: one for one in requests if one.memory is not None}
    found = [ProcessMemory(one.process, one.time, one.memory) for one in last.values() if one.memory is not None]
    return sorted(found, key=lambda each: each.time, reverse=True)[:most]
