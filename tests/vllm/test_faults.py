"""I6: whatever goes wrong in our code or in the store, the answer is that of a prompt without the chunk, or of plain
prefill; the engine goes on, the fault is logged and counted."""

from __future__ import annotations

import logging
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag import Generation, StoreError, policies
from cacheblend_rag.engines.model_files import tokenize_chunk
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.passes import Selection
from cacheblend_rag.vllm import forward

from ..engines.test_faults import FAULTS
from .conftest import CHUNKS, Case, Engines, assert_alike, connectors, forget_prefixes, open_engine, random_text

BLOCK = 32
SETTINGS: dict[str, Any] = {"max_tokens": 6, "logprobs": 4}


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "store"


@pytest.fixture
def case(engines: Engines, model: str, store_dir: Path) -> Case:
    """An engine that reads every chunk from disk, all chunks warm, nothing in the prefix cache."""
    from cacheblend_rag.store import DiskStore

    engine = engines.get(model, store_dir, engine_args={"block_size": BLOCK})
    for side in connectors(engine):  # no copies in memory: each read is one of the file
        for owner, name in (
            (side._scheduler and side._scheduler._library, "store"),
            (side._worker, "_store"),
            (side._worker and side._worker._meter, "_store"),
        ):
            if owner and not isinstance(getattr(owner, name), DiskStore):
                setattr(owner, name, getattr(owner, name).disk)
    engine.warm(CHUNKS)
    forget_prefixes(engine)
    connectors(engine)[0].faults.clear()
    return Case(engine, CHUNKS)


def used_chunks(case: Case, prompt: str) -> list[int]:
    return [n for n, text in enumerate(CHUNKS) if text[30:60] in prompt]


def without(case: Case, prompt: str, *numbers: int, **blend: Any) -> Generation:
    """The answer when some chunks are not warm."""
    case.engine.evict([CHUNKS[n] for n in numbers])
    forget_prefixes(case.engine)
    answer = case.engine.generate(prompt, blend=blend, **SETTINGS)
    case.engine.warm(CHUNKS)
    forget_prefixes(case.engine)
    return answer


def chunk_file(case: Case, store_dir: Path, number: int) -> Path:
    key = case.engine.scope.key(tokenize_chunk(case.engine._tokenizer, CHUNKS[number]))
    return next((store_dir / "chunks").rglob(f"{key}.safetensors"))


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_chunk_is_a_miss(
    case: Case, store_dir: Path, fault: Callable[[Path, Path], None], policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = case.prompt(0)
    bad, other = used_chunks(case, prompt)[:2]
    expected = without(case, prompt, bad, policy=policy)
    healthy = without(case, prompt, policy=policy)
    fault(chunk_file(case, store_dir, bad), chunk_file(case, store_dir, other))
    with caplog.at_level(logging.WARNING, logger="cacheblend_rag"):
        broken = case.engine.generate(prompt, blend={"policy": policy}, **SETTINGS)
    assert (broken.token_ids, broken.logprobs) == (expected.token_ids, expected.logprobs)
    assert broken.stats.decision == "blend"
    assert broken.stats.segments == expected.stats.segments == healthy.stats.segments - 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING]
    # Warming heals, and what was blended without the chunk is not found any more.
    assert case.engine.warm(CHUNKS).stored == 1
    again = case.engine.generate(prompt, blend={"policy": policy}, **SETTINGS)
    assert_alike([again], [healthy])


def test_too_little_is_left_to_be_blended(case: Case, store_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a blend takes beside its tokens counts again where a chunk turns out to be lost."""
    prompt, blend = case.prompt(0), {"policy": "query_aware", "mode": "auto", "min_reused_tokens": 0}
    bad = used_chunks(case, prompt)[0]
    left = without(case, prompt, bad, **blend).stats.reused_tokens
    monkeypatch.setattr(connectors(case.engine)[0]._scheduler, "_overhead", left + 1)
    assert without(case, prompt, **blend).stats.decision == "blend"
    plain = without(case, prompt, mode="off")
    chunk_file(case, store_dir, bad).write_bytes(b"")
    broken = case.engine.generate(prompt, blend=blend, **SETTINGS)
    assert (broken.token_ids, broken.stats.decision) == (plain.token_ids, "prefill")
    assert broken.stats.reason.endswith(f"a blend takes as long as prefill of {left + 1}")


def test_all_chunks_bad_is_plain_prefill(case: Case, store_dir: Path) -> None:
    prompt = case.prompt(1)
    plain = without(case, prompt, mode="off")
    for number in used_chunks(case, prompt):
        chunk_file(case, store_dir, number).write_bytes(b"")
    broken = case.engine.generate(prompt, **SETTINGS)
    assert (broken.token_ids, broken.stats.decision) == (plain.token_ids, "prefill")
    assert broken.stats.reused_tokens == 0


@pytest.mark.parametrize("earlier", ["overlaps", "is warmed meanwhile"])
def test_what_stands_in_for_a_lost_chunk_is_not_blended_into_shared_blocks(
    case: Case, earlier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a chunk others match, and they may begin in blocks before those that are salted."""
    engine, worker = case.engine, connectors(case.engine)[1]._worker

    def key(text: str) -> str:
        return engine.scope.key(tokenize_chunk(engine._tokenizer, text))

    lost = random_text(901, 300)
    head = random_text(902, 90)
    other = head[-12:] + lost[:100] if earlier == "overlaps" else head + random_text(903, 100)
    # The lost chunk begins with a block, what is found instead in the block before.
    prompt = random_text(904, 4 * BLOCK - 90) + (head if earlier == "overlaps" else other + ". ")
    prompt += "." * (-len(prompt) % BLOCK) + lost + "\nQuestion: what then, and why?\nAnswer:"
    engine.warm([lost, other])
    kept = worker._store.get(key(other))
    if earlier == "is warmed meanwhile":
        engine.evict([other])
    plain = without(case, prompt, mode="off")
    get = worker._store.get

    def lose(wanted: str) -> Any:
        if wanted != key(lost):
            return get(wanted)
        worker._store.put(kept)
        return None

    with monkeypatch.context() as patch:
        patch.setattr(worker._store, "get", lose)
        blended = engine.generate(prompt, blend={"recompute_ratio": 0.0}, **SETTINGS)
    after = engine.generate(prompt, blend={"mode": "off"}, **SETTINGS)
    engine.evict([lost, other])
    assert blended.stats.faults == 1
    assert after.stats.prefix_tokens >= BLOCK  # exact blocks of the blended prompt are shared
    assert_alike([after], [plain])


def test_the_kv_of_another_model_is_a_miss(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key says it fits, the shape says it does not."""
    import dataclasses

    worker = connectors(case.engine)[1]._worker
    prompt = case.prompt(2)
    expected = without(case, prompt, *used_chunks(case, prompt)[:1])
    victim = case.engine.scope.key(tokenize_chunk(case.engine._tokenizer, CHUNKS[used_chunks(case, prompt)[0]]))
    get = worker._store.get

    def halved(key: str) -> Any:
        chunk = get(key)
        return dataclasses.replace(chunk, kv=chunk.kv[:2]) if key == victim else chunk

    monkeypatch.setattr(worker._store, "get", halved)
    broken = case.engine.generate(prompt, **SETTINGS)
    assert (broken.token_ids, broken.stats.faults) == (expected.token_ids, 1)


def test_a_full_disk_is_an_error_of_warming_and_of_nothing_else(case: Case) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(StoreError):
            case.engine.warm(["brand new " + CHUNKS[0]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert case.engine.generate(case.prompt(0), **SETTINGS).stats.decision == "blend"
    assert case.engine.warm(["brand new " + CHUNKS[0]]).stored == 1
    case.engine.evict(["brand new " + CHUNKS[0]])


def explode(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected")


SCHEDULER_HOOKS = {
    "new_request": "on_new_request",
    "matched_tokens": "get_num_new_matched_tokens",
    "allocated": "update_state_after_alloc",
    "build_jobs": "build_connector_meta",
    "step_done": "update_connector_output",
    "finished": "request_finished",
}


@pytest.mark.parametrize("hook", SCHEDULER_HOOKS)
def test_a_fault_in_a_scheduler_hook(case: Case, hook: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    prompt = case.prompt(3)
    plain = without(case, prompt, mode="off")
    blended = without(case, prompt)
    connector = connectors(case.engine)[0]
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="cacheblend_rag"):
        patch.setattr(connector._scheduler, hook, explode)
        broken = case.engine.generate(prompt, **SETTINGS)
        case.engine.generate(case.prompt(4), **SETTINGS)
    assert broken.token_ids == (blended if hook in ("step_done", "finished") else plain).token_ids
    assert connector.faults[SCHEDULER_HOOKS[hook]] >= 2
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    assert_lives(case, prompt, blended)


@pytest.mark.parametrize("where", ["choose", "salt", "match"])
def test_a_fault_half_way_through_planning_blends_nothing(
    case: Case, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt whose hashes could not be salted must not be blended: its blocks would be found by plain requests."""
    from cacheblend_rag.vllm.isolation import BlockHashes, Salts

    prompt = case.prompt(3)
    plain = without(case, prompt, mode="off")
    half = connectors(case.engine)[0]._scheduler
    owner = {"choose": Salts, "salt": BlockHashes, "match": half._library}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, explode)
        broken = case.engine.generate(prompt, **SETTINGS)
    assert broken.token_ids == plain.token_ids
    after = case.engine.generate(prompt, blend={"mode": "off"}, **SETTINGS)
    assert after.token_ids == plain.token_ids


@pytest.mark.parametrize("hook", ["run_blends", "_blend", "_place", "_read_chunks"])
def test_a_fault_in_the_worker_before_the_blend(case: Case, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = case.prompt(3)
    plain, blended = without(case, prompt, mode="off"), without(case, prompt)
    with monkeypatch.context() as patch:
        patch.setattr(connectors(case.engine)[1]._worker, hook, explode)
        broken = case.engine.generate(prompt, **SETTINGS)
    assert broken.token_ids == plain.token_ids
    assert (broken.stats.decision, broken.stats.reason) == ("prefill", "blending failed, see the log")
    assert_lives(case, prompt, blended)


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_a_fault_in_a_layer_in_mid_blend(case: Case, calls: int, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself fails in the n-th layer that a blend runs: the prompt is prefilled in place."""
    prompt = case.prompt(3)
    plain = without(case, prompt, mode="off")
    blended = without(case, prompt, policy=policy)
    countdown = [calls]
    run_rows = forward.run_rows

    def failing(*args: Any, **kwargs: Any) -> Any:
        def count(module: Any, inputs: Any) -> None:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise RuntimeError("injected")

        layers = connectors(case.engine)[1]._worker._model.layers
        handles = [layer.register_forward_pre_hook(count) for layer in layers]
        try:
            return run_rows(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(forward, "run_rows", failing)
        broken = case.engine.generate(prompt, blend={"policy": policy}, **SETTINGS)
    assert countdown[0] <= 0
    assert broken.token_ids == plain.token_ids
    assert broken.stats.reason == "blending failed, see the log"
    assert_lives(case, prompt, blended, policy=policy)


@pytest.mark.parametrize("mode", ["one alone", "among others"])
def test_when_our_passes_fail_altogether_vllm_computes_the_prompt(
    case: Case, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [case.prompt(seed) for seed in range(1 if mode == "one alone" else 3)]
    plain = [without(case, prompt, mode="off") for prompt in prompts]
    blended = without(case, prompts[0])
    with monkeypatch.context() as patch:
        patch.setattr(forward, "run_rows", explode)
        broken = case.engine.generate(prompts, **SETTINGS)
    assert [answer.token_ids for answer in broken] == [answer.token_ids for answer in plain]
    assert {answer.stats.reason for answer in broken} == {"blending failed, see the log"}
    assert_lives(case, prompts[0], blended)


@pytest.mark.parametrize("hook", ["run_saves", "_save"])
def test_a_fault_while_storing(case: Case, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    new = ["another new " + CHUNKS[1]]
    with monkeypatch.context() as patch:
        patch.setattr(connectors(case.engine)[1]._worker, hook, explode)
        with pytest.raises(CacheBlendError):
            case.engine.warm(new)
    assert case.engine.warm(new).stored == 1
    case.engine.evict(new)


def test_a_policy_that_breaks_its_contract(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        reads_question = False
        adapts = False

        def cost(self, *args: object) -> float:
            return 0.0

        def select(self, layout: PromptLayout, *args: Any) -> Selection:
            yield from ()
            return "broken", layout.missed[:1]

    monkeypatch.setitem(policies._POLICIES, "broken", Broken())
    prompt = case.prompt(3)
    plain = without(case, prompt, mode="off")
    broken = case.engine.generate(prompt, blend={"policy": "broken"}, **SETTINGS)
    assert (broken.token_ids, broken.stats.decision) == (plain.token_ids, "prefill")
    assert "policy 'broken' chose a position" in broken.stats.reason


def test_an_engine_that_dies_answers_everybody(model: str, engines: Engines) -> None:
    engines.close()
    engine = open_engine(model)
    engine._thread.engine.step = explode
    answers: list[BaseException] = []

    def ask() -> None:
        try:
            engine.generate("hello", max_tokens=3)
        except CacheBlendError as error:
            answers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(answers) == 3
    with pytest.raises(CacheBlendError, match="has ended"):
        engine.generate("hello", max_tokens=3)
    engine.close()


def assert_lives(case: Case, prompt: str, blended: Generation, **blend: Any) -> None:
    """The engine answers as before, blended and plain."""
    answer = case.engine.generate(prompt, blend=blend, **SETTINGS)
    assert_alike([answer], [blended])
    assert answer.stats.decision != "prefill"
    plain = case.engine.generate(prompt, blend={"mode": "off"}, **SETTINGS)
    forget_prefixes(case.engine)
    assert_alike([plain], [case.engine.generate(prompt, blend={"mode": "off"}, **SETTINGS)])
