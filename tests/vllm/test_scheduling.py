"""Blends among everything else that vLLM schedules: chunked prefill, preemption, concurrency, aborts, ``n > 1``."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import StoreError
from cacheblend_rag.errors import AnswerTimeoutError, EngineClosedError
from cacheblend_rag.store import open_store
from cacheblend_rag.vllm.costs import DiskCosts
from cacheblend_rag.vllm.forward import PagedForward
from cacheblend_rag.vllm.waiting import MemoryTier

from .conftest import (
    CHUNKS,
    Case,
    Engines,
    alone,
    assert_alike,
    connectors,
    forget_prefixes,
    recorded_logits,
    scheduler,
    together,
)

BLOCK = 32
TOLERANCE = 1e-4

# One engine for most of this file: room for a few short prompts, but not for their answers, and steps far shorter
# than a prompt.
TIGHT: dict[str, Any] = {
    "block_size": BLOCK,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 46,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
}


@pytest.fixture
def case(engines: Engines, model: str) -> Case:
    engine = engines.get(model, engine_args=TIGHT)
    engine.warm(CHUNKS)
    forget_prefixes(engine)
    return Case(engine, CHUNKS)


@pytest.fixture
def preemptions(case: Case) -> Iterator[list[str]]:
    """The requests that were preempted."""
    found: list[str] = []
    owner = scheduler(case.engine)
    preempt = owner._preempt_request

    def count(request: Any, *args: Any, **kwargs: Any) -> None:
        found.append(request.request_id)
        preempt(request, *args, **kwargs)

    owner._preempt_request = count
    yield found
    del owner._preempt_request


def test_what_can_not_pay_is_not_matched(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a short prompt nor one of which little is left behind the prefix cache."""
    library = connectors(case.engine)[0]._scheduler._library
    match, matched = library.match, []
    monkeypatch.setattr(library, "match", lambda ids, exclude: matched.append(len(ids)) or match(ids, exclude))
    prompt = case.prompt(0)
    tokens = len(case.ids(prompt))

    def ask(least: int) -> Any:
        return case.engine.generate(prompt, max_tokens=1, blend={"mode": "auto", "min_reused_tokens": least}).stats

    stats = ask(tokens)
    assert (stats.decision, stats.reason) == (
        "prefill",
        f"{tokens - 1} tokens could be reused, min_reused_tokens is {tokens}",
    )
    stats = ask(64)
    assert (stats.decision, stats.prefix_tokens) == ("prefix", (tokens - 1) // BLOCK * BLOCK)
    assert matched == []
    forget_prefixes(case.engine)
    assert ask(tokens - 1).decision == "prefill"  # the chunks are less than the prompt
    assert ask(64).decision == "prefix"
    forget_prefixes(case.engine)
    assert ask(64).decision == "blend"
    assert matched == [tokens, tokens]


def test_a_prompt_longer_than_a_step(case: Case) -> None:
    """Blended tokens cost no budget of the step; passes are sliced to it, hkvd's first layers too."""
    prompt = case.prompt(0)
    plain = case.logits(prompt, mode="off")
    longest = []
    run = PagedForward._run

    def watched(self: PagedForward, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        longest.append(len(rows))
        return run(self, rows, where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedForward, "_run", watched)
        for policy in ("hkvd", "query_aware"):
            assert float((case.logits(prompt, recompute_ratio=1.0, policy=policy) - plain).abs().max()) < TOLERANCE
            case.logits(prompt, recompute_ratio=0.3, policy=policy)
    assert max(longest) == TIGHT["max_num_batched_tokens"] < len(prompt) / 8


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
def test_slices_give_what_one_pass_gives(case: Case, policy: str) -> None:
    prompt = case.prompt(1)
    sliced = case.logits(prompt, recompute_ratio=0.3, policy=policy)
    model = connectors(case.engine)[1]._worker._model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "max_rows", 4096)
        whole = case.logits(prompt, recompute_ratio=0.3, policy=policy)
    assert float((sliced - whole).abs().max()) < TOLERANCE


def test_vllm_computes_one_token_of_a_blended_prompt(case: Case) -> None:
    scheduled = []
    connector = connectors(case.engine)[0]
    build = connector.build_connector_meta

    def watch(output: Any) -> Any:
        scheduled.append(dict(output.num_scheduled_tokens))
        return build(output)

    connector.build_connector_meta = watch
    try:
        case.engine.generate(case.prompt(2), max_tokens=1)
    finally:
        del connector.build_connector_meta
    assert [list(step.values()) for step in scheduled if step] == [[1]]


def test_blended_and_plain_requests_in_one_step(engines: Engines, model: str) -> None:
    """Three blended and three plain requests, sent together, answer as they do alone."""
    engine = engines.get(model, engine_args={"block_size": BLOCK})
    engine.warm(CHUNKS)
    case = Case(engine, CHUNKS)
    prompts = [case.prompt(seed) for seed in range(6)]
    modes = ["blend", "off"] * 3
    expected = [
        alone(case, [p], max_tokens=12, logprobs=3, blend={"mode": m})[0] for p, m in zip(prompts, modes, strict=True)
    ]
    requests = [
        (p, {"max_tokens": 12, "logprobs": 3, "blend": {"mode": m}}) for p, m in zip(prompts, modes, strict=True)
    ]
    with recorded_logits(engine) as steps:
        answers = together(engine, requests)
    assert max(len(logits) for logits in steps) == 6  # they did run together
    assert_alike(answers, expected)
    assert [answer.stats.decision == "blend" for answer in answers] == [True, False] * 3


@pytest.mark.parametrize(("step_rows", "most"), [(1, 1), (10**6, 4)])
def test_a_step_blends_no_more_than_it_may(engines: Engines, model: str, step_rows: int, most: int) -> None:
    """Four blended requests, sent together: one a step if the limit is low, and then they wait, and answer alike."""
    engine = engines.get(model, engine_args={"block_size": BLOCK})
    engine.warm(CHUNKS)
    case = Case(engine, CHUNKS)
    # None waits for blocks that another one fills.
    prompts = [f"Reader {seed}: {case.prompt(seed)}" for seed in range(40, 44)]
    settings = {"max_tokens": 4, "logprobs": 2, "blend": {"mode": "blend"}}
    expected = alone(case, prompts, **settings)
    connector = connectors(engine)[0]
    build, blends = connector.build_connector_meta, []

    def watch(output: Any) -> Any:
        jobs = build(output)
        blends.append(len(jobs.blends))
        return jobs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connector, "build_connector_meta", watch)
        patch.setattr(connector._scheduler, "_step_rows", step_rows)
        answers = together(engine, [(prompt, settings) for prompt in prompts])
    assert sum(blends) == 4
    assert max(blends) == most
    assert_alike(answers, expected)


def test_preempted_requests_answer_as_they_do_alone(case: Case, preemptions: list[str]) -> None:
    """More answers than the KV cache holds: some requests lose their blocks and are read again."""
    prompts = [case.prompt(seed, chunks=1) for seed in range(8)]
    settings = {"max_tokens": 60, "logprobs": 2}
    expected = alone(case, prompts, **settings)
    assert not preemptions
    answers = case.engine.generate(prompts, **settings)
    assert preemptions
    assert_alike(answers, expected)


def test_preempted_plain_requests_among_blended_ones(case: Case, preemptions: list[str]) -> None:
    prompts = [case.prompt(seed, chunks=1) for seed in range(8)]
    modes = [{"mode": mode} for mode in ("blend", "off") * 4]
    settings = {"max_tokens": 60, "logprobs": 2}
    requests = [(prompt, {"blend": mode, **settings}) for prompt, mode in zip(prompts, modes, strict=True)]
    expected = [alone(case, [prompt], **arguments)[0] for prompt, arguments in requests]
    answers = together(case.engine, requests)
    assert preemptions
    assert_alike(answers, expected)


def test_aborts_leave_nothing_behind(case: Case) -> None:
    engine = case.engine
    expected = alone(case, [case.prompt(3)], max_tokens=8, logprobs=3)
    pool = scheduler(engine).kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    for seed in range(4):
        stream = engine.stream(case.prompt(seed), max_tokens=200)
        if seed:
            next(stream)
        stream.close()
    assert_alike([engine.generate(case.prompt(3), max_tokens=8, logprobs=3)], expected)
    assert pool.get_num_free_blocks() == free
    assert not connectors(engine)[0]._scheduler._plans


def test_an_abort_in_mid_blend(case: Case) -> None:
    """The request is gone when its blend is done: as if a client hung up while the step was in flight."""
    from vllm.v1.request import RequestStatus

    engine = case.engine
    owner = scheduler(engine)
    worker = connectors(engine)[1]._worker
    expected = alone(case, [case.prompt(4)], max_tokens=8, logprobs=3)
    blend = worker.run_blends

    def blend_and_hang_up(jobs: Any) -> bool:
        done: bool = blend(jobs)
        owner.finish_requests([job.request_id for job in jobs.blends], RequestStatus.FINISHED_ABORTED)
        return done

    free = owner.kv_cache_manager.block_pool.get_num_free_blocks()
    worker.run_blends = blend_and_hang_up
    try:
        with pytest.raises(AnswerTimeoutError):  # nobody answers an aborted request
            engine.generate(case.prompt(4), max_tokens=8, timeout=2)
    finally:
        del worker.run_blends
    assert_alike([engine.generate(case.prompt(4), max_tokens=8, logprobs=3)], expected)
    half = connectors(engine)[0]._scheduler
    assert not half._plans
    assert not half._box.reports
    assert owner.kv_cache_manager.block_pool.get_num_free_blocks() == free


def test_several_answers_to_one_prompt(case: Case) -> None:
    """``n=3``: three requests of one prompt, the later ones on the first one's blended blocks."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = case.engine
    prompt = case.prompt(5)
    ids = case.ids(prompt)
    (single,) = alone(case, [prompt], max_tokens=10, logprobs=3)
    params = SamplingParams(
        n=3,
        top_k=1,
        max_tokens=10,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"kv_transfer_params": {"cacheblend": {"mode": "blend"}}},
    )
    *_, last = engine._thread.send("several", ids, params)
    assert len(last.value.outputs) == 3
    assert all(list(output.token_ids) == single.token_ids for output in last.value.outputs)
    assert last.value.kv_transfer_params["cacheblend"]["decision"] in ("blend", "prefix")


def test_warming_while_queries_are_served(case: Case) -> None:
    engine = case.engine
    expected = alone(case, [case.prompt(0)], max_tokens=60, logprobs=3)
    new = [f"{n} {text}" for n, text in enumerate(CHUNKS)]
    report: list[Any] = []
    warming = threading.Thread(target=lambda: report.append(engine.warm(new)))
    stream = engine.stream(case.prompt(0), max_tokens=60, logprobs=3)
    first = next(stream)
    warming.start()
    *_, last = stream
    warming.join()
    assert first.generation is None and last.generation is not None
    assert_alike([last.generation], expected)
    assert report[0].stored == len(new)
    assert engine.warm(new).already_there == len(new)
    assert engine.evict(new) == len(new)


def test_chunks_by_their_keys(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked in batches, listed in pages."""
    engine = case.engine
    monkeypatch.setattr("cacheblend_rag.engines.connected.MOST_KEYS", 4)
    monkeypatch.setattr("cacheblend_rag.library._KEYS_AT_ONCE", 4)
    cold = "never seen before by anybody"
    assert engine.is_warm([cold, *CHUNKS, ""]) == [False, *[True] * (len(CHUNKS) + 1)]
    keys = engine.chunk_keys(CHUNKS)
    assert engine.stored_keys() == set(keys)
    foreign = [key[::-1] for key in keys]
    assert engine.evict_keys([*foreign, *keys[4:], "no key"]) == 2
    assert engine.is_warm(CHUNKS) == [True] * 4 + [False] * 2
    assert engine.stored_keys() == set(keys[:4])


def test_a_store_that_fails_is_the_callers_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(key: str) -> bool:
        raise StoreError("the disk is read-only")

    engine = case.engine
    with monkeypatch.context() as patch:
        patch.setattr(connectors(engine)[0]._scheduler._library.store, "delete", fail)
        for evict in (lambda: engine.evict(CHUNKS[:1]), lambda: engine.evict_keys(engine.chunk_keys(CHUNKS[:1]))):
            with pytest.raises(StoreError, match="read-only"):
                evict()
    assert engine.is_warm(CHUNKS[:1]) == [True]


def test_prefetching_delays_no_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine
    keys = engine.chunk_keys(CHUNKS)
    store = connectors(engine)[1]._worker._store
    store.memory.close()  # as after a restart
    expected = alone(case, [case.prompt(0)], max_tokens=4, logprobs=3)
    store.memory.close()
    go, read = threading.Event(), store.disk.get

    def slow(key: str) -> Any:
        go.wait(timeout=120)
        return read(key)

    monkeypatch.setattr(store.disk, "get", slow)
    engine.prefetch([*CHUNKS, "never seen before by anybody"])
    assert engine.generate("Once upon a time", max_tokens=4).token_ids  # while the disk does not answer
    assert not any(key in store.memory for key in keys)
    go.set()
    deadline = time.monotonic() + 60
    while not all(key in store.memory for key in keys):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(store.disk, "get", None)  # what is in memory is not read again
    engine.prefetch(CHUNKS)
    assert_alike([engine.generate(case.prompt(0), max_tokens=4, logprobs=3)], expected)


@pytest.fixture
def slow_disk(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[str]]:
    """All chunks are on disk only, as after a restart, and the disk answers from when the event is set on; the names of
    the threads that read."""
    scheduler_side, worker_side = connectors(case.engine)
    store = worker_side._worker._store
    case.engine.generate("Once upon a time", max_tokens=2)  # what was brought before has been told,
    scheduler_side._scheduler._note_brought()  # and heard
    store.memory.close()
    monkeypatch.setattr(scheduler_side._scheduler, "_memory", MemoryTier(store.memory.max_bytes))
    monkeypatch.setattr("cacheblend_rag.vllm.waiting._MOST_SECONDS", 60.0)  # not over before a slow machine is ready
    go, readers, read = threading.Event(), list[str](), store.disk.get

    def slow(key: str) -> Any:
        readers.append(threading.current_thread().name)
        assert go.wait(timeout=60)
        return read(key)

    monkeypatch.setattr(store.disk, "get", slow)
    return go, readers


def test_requests_wait_for_disk_outside_of_steps(case: Case, slow_disk: tuple[threading.Event, list[str]]) -> None:
    go, readers = slow_disk
    engine, settings = case.engine, {"max_tokens": 4, "logprobs": 3}
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(engine.generate, case.prompt(seed), **settings) for seed in (0, 1)]
        deadline = time.monotonic() + 60
        while not readers and time.monotonic() < deadline:
            time.sleep(0.01)
        meanwhile = engine.generate("Once upon a time", max_tokens=4)
        early = [one.done() for one in waiting]
        go.set()
        answers = [one.result() for one in waiting]
    assert set(readers) == {"cacheblend-prefetch"}
    assert meanwhile.token_ids and early == [False, False]
    assert [answer.stats.decision for answer in answers] == ["blend"] * 2
    again = alone(case, [case.prompt(seed) for seed in (0, 1)], **settings)
    assert_alike(answers, again)
    # What both need was read once, for the first of them; what is in memory now is not read from disk again.
    used = [case.engine.chunk_keys(CHUNKS).index(key) for seed in (0, 1) for key in keys_in(case, case.prompt(seed))]
    store = connectors(engine)[1]._worker._store
    size = [store.memory.get(key).nbytes if key in store.memory else 0 for key in engine.chunk_keys(CHUNKS)]
    assert len(set(used)) < len(used)
    assert sum(one.stats.read_bytes["disk"] for one in answers) == sum(size[n] for n in set(used))
    assert sum(sum(one.stats.read_bytes.values()) for one in answers) == sum(size[n] for n in used)
    assert all(one.stats.read_seconds["disk"] > 0 for one in answers)
    assert [list(one.stats.read_bytes) for one in again] == [["memory"]] * 2
    assert sum(one.stats.read_bytes["memory"] for one in again) == sum(size[n] for n in used)


AUTO: dict[str, Any] = {"mode": "auto", "min_reused_tokens": 0}


def slow_disk_costs(case: Case, monkeypatch: pytest.MonkeyPatch) -> DiskCosts:
    """A disk that is known to be far slower than the model."""
    costs = DiskCosts()
    costs.prefill = 1e-6
    costs.note_read(tokens=1, seconds=1.0)
    monkeypatch.setattr(connectors(case.engine)[0]._scheduler, "costs", costs)
    return costs


def keys_in(case: Case, prompt: str) -> list[str]:
    """The chunks of a prompt."""
    segments = connectors(case.engine)[0]._scheduler._library.match(case.ids(prompt))
    return list(dict.fromkeys(segment.key for segment in segments))


def step(case: Case) -> None:
    """A step, after which the scheduler half hears what the workers have told."""
    case.engine.generate("Once upon a time", max_tokens=2)
    connectors(case.engine)[0]._scheduler._note_brought()


def test_what_is_read_later_than_prefilled_is_prefilled(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mode "auto". It is brought all the same, for the next one, which is blended."""
    go, readers = slow_disk
    costs = slow_disk_costs(case, monkeypatch)
    settings: dict[str, Any] = {"max_tokens": 4, "logprobs": 3}
    prompt = case.prompt(0)
    another = prompt.replace("Question 0", "Question 9")
    chunks = len(keys_in(case, prompt))
    answer = case.engine.generate(prompt, blend=AUTO, **settings)  # the disk does not answer yet
    assert answer.stats.decision == "prefill"
    slow = f"{chunks} known chunks are on disk, where reading takes longer than it saves"
    assert answer.stats.reason == slow
    assert costs.wait > 0
    forget_prefixes(case.engine)
    case.engine.generate(another, blend=AUTO, max_tokens=1)  # they have been asked for: not once more
    go.set()
    deadline = time.monotonic() + 60
    while costs._coming:
        assert time.monotonic() < deadline
        step(case)
    assert len(readers) == chunks
    assert len(costs._reads) > 1
    forget_prefixes(case.engine)
    plain = case.engine.generate(prompt, blend={"mode": "off"}, **settings)
    again = case.engine.generate(prompt, blend=AUTO, **settings)
    assert again.stats.decision == "prefix"  # its plain blocks: nobody finds others under their names
    assert_alike([answer, again], [plain, plain])
    forget_prefixes(case.engine)
    assert case.engine.generate(another, blend=AUTO, max_tokens=1).stats.decision == "blend"


def test_no_longer_is_waited_than_the_whole_blend_saves(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is read in half the time that it is prefilled in. What a blend takes besides leaves little of that."""
    go, _ = slow_disk
    half, prompt = connectors(case.engine)[0]._scheduler, case.prompt(0)
    too_much = AUTO | {"min_reused_tokens": len(case.ids(prompt)) - 10}
    reason = case.engine.generate(prompt, blend=too_much, max_tokens=1).stats.reason
    found = re.match(r"blending would reuse (\d+) tokens and compute (\d+) more", reason)
    assert found
    reused, cost = map(int, found.groups())
    forget_prefixes(case.engine)
    costs = DiskCosts()
    costs.prefill = 1.0
    costs.note_read(tokens=2, seconds=1.0)
    monkeypatch.setattr(half, "costs", costs)
    monkeypatch.setattr(half, "_overhead", reused - cost - 10)
    plan_blends, waits = half._plan_blends, []

    def note(plan: Any) -> None:
        plan_blends(plan)
        waits.append(plan.wait)

    monkeypatch.setattr(half, "_plan_blends", note)
    answer = case.engine.generate(prompt, blend=AUTO, max_tokens=1)  # the disk does not answer yet
    assert (answer.stats.decision, waits) == ("prefill", [None])
    assert "on disk, where reading takes longer than it saves" in answer.stats.reason
    forget_prefixes(case.engine)
    go.set()
    monkeypatch.setattr(half, "_overhead", 0)
    assert case.engine.generate(prompt, blend=AUTO, max_tokens=1).stats.decision == "blend"


def test_what_is_in_memory_is_blended_without_what_is_not(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that without the chunks left out, also where one more is lost on the way."""
    go, _ = slow_disk
    half, worker = connectors(case.engine)[0]._scheduler, connectors(case.engine)[1]._worker
    prompt, settings = case.prompt(0), {"max_tokens": 4, "logprobs": 3}
    left_out, *known = keys_in(case, prompt)
    costs = slow_disk_costs(case, monkeypatch)
    costs.note_asked("another", 10**9)  # it is left there
    read = worker._store.get

    def ask(lost: str | None = None) -> Any:
        forget_prefixes(case.engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(half, "_memory", MemoryTier(1 << 30))
            for key in known:
                half._memory.add(key, 1)
            patch.setattr(worker._store, "get", lambda key: None if key == lost else read(key))
            return case.engine.generate(prompt, blend=AUTO, **settings)

    go.set()
    answer = ask()
    assert (answer.stats.decision, answer.stats.faults) == ("blend", 0)
    assert answer.stats.reason.endswith("; 1 known chunks are on disk, where reading takes longer than it saves")
    lost = ask(known[-1])
    assert (lost.stats.decision, lost.stats.faults) == ("blend", 1)

    def expected(*missing: str) -> Any:
        forget_prefixes(case.engine)
        match = half._library.match
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(half._library, "match", lambda ids, exclude: match(ids, {*exclude, *missing}))
            return case.engine.generate(prompt, blend={"mode": "blend"}, **settings)

    assert_alike([answer, lost], [expected(left_out), expected(left_out, known[-1])])


def test_blended_blocks_in_the_prefix_cache_need_no_disk(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, readers = slow_disk
    go.set()
    half = connectors(case.engine)[0]._scheduler
    prompt = case.prompt(0) + " " + "And so on. " * 5  # past the last chunk: all its blocks are full
    first = case.engine.generate(prompt, max_tokens=4, logprobs=3)
    assert first.stats.decision == "blend"
    slow_disk_costs(case, monkeypatch)
    monkeypatch.setattr(half, "_memory", MemoryTier(1 << 30))  # they have been dropped
    del readers[:]
    again = case.engine.generate(prompt, max_tokens=4, logprobs=3, blend=AUTO)
    assert again.stats.prefix_tokens >= len(case.ids(prompt)) - BLOCK
    assert "disk" not in again.stats.reason
    assert readers == []
    assert_alike([again], [first])


def test_evicted_blocks_are_waited_for_again(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that the prefix cache made needless when the request came, and that are needed now."""
    go, readers = slow_disk
    go.set()
    half = connectors(case.engine)[0]._scheduler
    prompt = case.prompt(0) + " " + "And so on. " * 5
    first = case.engine.generate(prompt, max_tokens=4, logprobs=3)
    monkeypatch.setattr(half, "_memory", MemoryTier(1 << 30))
    connectors(case.engine)[1]._worker._store.memory.close()
    del readers[:]
    new_request = half.new_request

    def evicted_after_planning(request: Any) -> None:
        new_request(request)
        assert half._plans[request.request_id].cached > 0
        scheduler(case.engine).kv_cache_manager.block_pool.reset_prefix_cache()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half, "new_request", evicted_after_planning)
        again = case.engine.generate(prompt, max_tokens=4, logprobs=3)
    assert again.stats.prefix_tokens == 0
    assert set(readers) == {"cacheblend-prefetch"}
    assert_alike([again], [first])


def test_waiting_longer_than_prefill_takes_does_not_pay(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known of the disk, and it does not answer. In mode "auto" only."""
    go, readers = slow_disk
    half = connectors(case.engine)[0]._scheduler
    costs = DiskCosts()
    costs.prefill = 1e-4
    monkeypatch.setattr(half, "costs", costs)
    settings: dict[str, Any] = {"max_tokens": 4, "logprobs": 3}
    half.metrics.reset()
    answer = case.engine.generate(case.prompt(0), blend=AUTO, **settings)
    assert answer.stats.decision == "prefill"
    assert "on disk, where reading takes longer than it saves" in answer.stats.reason
    assert set(readers) == {"cacheblend-prefetch"}
    forget_prefixes(case.engine)
    plain = case.engine.generate(case.prompt(0), blend={"mode": "off"}, **settings)
    assert_alike([answer], [plain])
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(case.engine.generate, case.prompt(0), blend={"mode": "blend"}, **settings)
        time.sleep(0.5)
        assert not waiting.done()
        go.set()
        assert waiting.result().stats.decision == "blend"


def test_what_comes_during_a_long_step_is_not_given_up(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is heard of when the step ends."""
    go, _ = slow_disk
    costs = DiskCosts()
    costs.prefill = 1e-6
    monkeypatch.setattr(connectors(case.engine)[0]._scheduler, "costs", costs)
    monkeypatch.setattr(costs, "note_heard", lambda: None)  # none has ended yet
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(case.engine.generate, case.prompt(0), blend=AUTO, max_tokens=1)
        time.sleep(0.5)
        go.set()
        assert waiting.result().stats.decision == "blend"


def test_a_next_turn_finds_what_was_blended_without_chunks_on_disk(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in memory by then; but with them, it would have to be blended anew."""
    go, _ = slow_disk
    go.set()
    half = connectors(case.engine)[0]._scheduler
    prompt = case.prompt(0)
    _, *known = keys_in(case, prompt)
    slow_disk_costs(case, monkeypatch)
    monkeypatch.setattr(half, "_memory", MemoryTier(1 << 30))
    for key in known:
        half._memory.add(key, 1)
    first = case.engine.generate(prompt, blend=AUTO, max_tokens=40)
    assert first.stats.decision == "blend"
    assert "1 known chunks are on disk" in first.stats.reason
    deadline = time.monotonic() + 60
    while half._memory.missing(keys_in(case, prompt)):
        assert time.monotonic() < deadline
        step(case)
    ids = [*case.ids(prompt), *first.token_ids[:-1], *case.ids(" And then, what else?")]
    turn = case.engine.generate(ids, blend=AUTO, max_tokens=1)
    assert turn.stats.prefix_tokens >= len(case.ids(prompt)) - BLOCK


def test_without_memory_steps_read_what_is_sooner_read(engines: Engines, model: str, tmp_path: Path) -> None:
    engine = engines.get(model, open_store(tmp_path, memory_bytes=0))
    engine.warm(CHUNKS)
    case = Case(engine, CHUNKS)
    half = connectors(engine)[0]._scheduler
    stats = engine.generate(case.prompt(0), max_tokens=1, blend=AUTO).stats
    assert stats.decision == "blend"
    kept = [connectors(engine)[1]._worker._store.get(key) for key in keys_in(case, case.prompt(0))]
    assert stats.read_bytes == {"disk": sum(chunk.nbytes for chunk in kept)}
    assert 0 < stats.read_seconds["disk"] < stats.load
    step(case)
    assert half.costs.prefill == connectors(engine)[1]._found.prefill_seconds > 0  # what the worker timed has been told
    assert half.costs._reads  # the step's own reads
    half.costs.prefill = 1e-12
    assert engine.generate(case.prompt(1), max_tokens=1, blend=AUTO).stats.decision == "prefill"
    assert engine.generate(case.prompt(2), max_tokens=1, blend={"mode": "blend"}).stats.decision == "blend"


def test_a_request_does_not_wait_for_ever(
    case: Case, slow_disk: tuple[threading.Event, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody brings its chunks: after a while, the step reads them."""
    go, readers = slow_disk
    go.set()
    monkeypatch.setattr("cacheblend_rag.vllm.waiting._MOST_SECONDS", 0.3)
    monkeypatch.setattr(connectors(case.engine)[1]._worker, "prefetch", lambda keys: None)
    answer = case.engine.generate(case.prompt(0), max_tokens=4)
    assert answer.stats.decision == "blend"
    assert set(readers) == {"vllm"}


def test_a_chunk_that_is_waited_for_is_gone(case: Case, slow_disk: tuple[threading.Event, list[str]]) -> None:
    go, _ = slow_disk
    worker = connectors(case.engine)[1]._worker
    expected = alone(case, [case.prompt(0)], blend={"mode": "off"}, max_tokens=4, logprobs=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker._store, "get", lambda key: None)
        go.set()
        answer = case.engine.generate(case.prompt(0), max_tokens=4, logprobs=3)
    assert answer.stats.decision == "prefill" and answer.stats.faults
    assert_alike([answer], expected)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 40)), max_size=40), st.integers(1, 100))
def test_the_scheduler_knows_what_memory_keeps(brought: list[tuple[str, int]], most: int) -> None:
    """As long as it is told everything: the least recently used ones are gone."""
    tier, kept = MemoryTier(most), OrderedDict[str, int]()
    for key, nbytes in brought:
        kept.pop(key, None)
        kept[key] = nbytes
        while sum(kept.values()) > most:
            kept.popitem(last=False)
        tier.add(key, nbytes)
        used = sorted(kept)[:1]
        assert tier.missing(used) == []
        for one in used:
            kept.move_to_end(one)
    everything = list("abcdefgh")
    assert tier.missing(everything) == [key for key in everything if key not in kept]


def test_without_memory_nobody_waits() -> None:
    assert MemoryTier(0).missing(["a"]) == []


def test_what_is_under_way_ends_with_the_engine(case: Case, engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = case.engine
    begun = engine.stream("a prompt", max_tokens=500, ignore_eos=True)
    next(begun)
    store = connectors(case.engine)[1]._worker._store
    store.memory.close()
    reading, read = threading.Event(), store.disk.get

    def slow(key: str) -> Any:
        reading.set()
        time.sleep(0.2)
        return read(key)

    monkeypatch.setattr(store.disk, "get", slow)
    case.engine.prefetch(CHUNKS)
    assert reading.wait(timeout=20)
    engines.close()
    assert not any(thread.name == "cacheblend-prefetch" for thread in threading.enumerate())
    calls: list[Callable[[], object]] = [
        lambda: list(begun),
        lambda: engine.generate("a prompt", max_tokens=1),
        lambda: engine.warm(["text"]),
        lambda: engine.is_warm(["text"]),
        lambda: engine.evict(["text"]),
        lambda: engine.evict_keys(["key"]),
        lambda: engine.stored_keys(),
        lambda: engine.render_chat([{"role": "user", "content": "Once"}]),
        lambda: engine.decode([1]),
        lambda: engine.count_tokens("Once"),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="closed: load it again"):
            call()
