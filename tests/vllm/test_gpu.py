"""I1, I2 and I3 on a CUDA GPU: FlashAttention in bfloat16 on a random Llama of 8 billion parameters and on SmolLM2, and
float32 on SmolLM2; eager, and with vLLM's compiled model and CUDA graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from cacheblend_rag import BlendConfig, Generation, policies
from cacheblend_rag.budget import Budget
from cacheblend_rag.engines.vllm import VllmEngine
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.passes import Selection
from cacheblend_rag.vllm import kernel_passes
from cacheblend_rag.vllm.forward import AskedPrompt, PagedForward

from .conftest import (
    Case,
    Engines,
    alone,
    connectors,
    forget_prefixes,
    inject_exact_kv,
    moved_logits,
    random_text,
    recorded_logits,
    runner,
    scheduler,
    together,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": 256,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
CHUNKS = [random_text(seed, 520 + 10 * seed) for seed in range(8)]


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> str:
    """A directory without weights: vLLM makes some up."""
    directory = tmp_path_factory.mktemp("llama-8b")
    AutoConfig.for_model(**LLAMA_8B).save_pretrained(directory)
    byte_tokenizer.save_pretrained(directory)
    return str(directory)


@torch.inference_mode()
def randomise(engine: VllmEngine) -> None:
    """Weights with which attention is far from uniform: vLLM's are so small that wrong KV would hardly show."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    for name, parameter in runner(engine).model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


CASES: dict[str, dict[str, Any]] = {
    "llama-8b eager": {"dtype": "bfloat16", "enforce_eager": True},
    "smollm2 bfloat16 eager": {"dtype": "bfloat16", "enforce_eager": True},
    "smollm2 bfloat16 compiled": {"dtype": "bfloat16", "enforce_eager": False, "gpu_bytes": 1 << 30},
    "smollm2 float32 eager": {"dtype": "float32", "enforce_eager": True},
    "smollm2 cache of 8 bits": {"dtype": "bfloat16", "enforce_eager": False, "kv_cache_dtype": "fp8"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, engines: Engines) -> Case:
    settings = dict(CASES[request.param])
    dtype = settings.pop("dtype")
    big = request.param.startswith("llama-8b")
    model: str = request.getfixturevalue("llama_8b" if big else "smollm2")
    engine_args = {**settings, "max_model_len": 8192, "gpu_memory_utilization": 0.7}
    if big:
        engine_args["load_format"] = "dummy"
    engine = engines.get(model, dtype=dtype, engine_args=engine_args)
    if big:
        randomise(engine)
    engine.warm(CHUNKS)
    backend = connectors(engine)[1]._worker._model.layers[0].get_attn_backend().get_name()
    print(f"{request.param}: attention {backend}, model runner {type(runner(engine)).__module__}")
    assert backend == "FLASH_ATTN" or dtype == "float32"
    return Case(engine, CHUNKS)


def noise(case: Case, ids: list[int], plain: torch.Tensor) -> float:
    """What counts as equal: twice what plain prefill shows against itself in pieces, large and small, for which other
    kernels multiply (in float32, too: in TF32)."""
    differences = []
    for cut in (*range(len(ids) // 6, len(ids), len(ids) // 6), *(len(ids) - rows for rows in (200, 100, 50, 20))):
        forget_prefixes(case.engine)
        case.engine.generate(ids[:cut], max_tokens=1, blend={"mode": "off"})
        differences.append(float((first_logits(case, ids, mode="off") - plain).abs().max()))
    return 2 * max(differences)


def is_coarse(case: Case) -> bool:
    """Whether plain prefill differs from itself more than reuse does from it: FlashAttention 3 takes queries of 8 bits
    over a cache of 8 bits."""
    return bool(connectors(case.engine)[1]._worker._model.kv.is_float8)


def first_logits(case: Case, ids: list[int], **blend: Any) -> torch.Tensor:
    """Logits of the first token, with whatever is in the prefix cache."""
    with recorded_logits(case.engine) as logits:
        case.engine.generate(ids, max_tokens=1, blend=blend)
    return logits[-1][0]


@pytest.mark.parametrize("seed", range(2))
def test_i1_ratio_one_is_plain_prefill(case: Case, seed: int) -> None:
    ids = case.ids(case.prompt(seed, chunks=6))
    plain = case.logits(ids, mode="off")
    allowed = noise(case, ids, plain)
    exact = float((case.logits(ids, recompute_ratio=1.0) - plain).abs().max())
    reuse = float((case.logits(ids, recompute_ratio=0.0) - plain).abs().max())
    print(f"{len(ids)} tokens: ratio 1 off by {exact:.2e}, allowed {allowed:.2e}, full reuse {reuse:.2e}")
    assert exact <= allowed
    assert allowed < reuse or is_coarse(case)


@pytest.mark.parametrize("shift", [0, 97])
def test_i2_exact_kv_gives_exact_answers(
    case: Case, shift: int, monkeypatch: pytest.MonkeyPatch, random_policies: None
) -> None:
    ids = case.ids(case.prompt(7, chunks=6))
    segments = inject_exact_kv(case.engine, ids, shift, monkeypatch)
    assert len(segments) == 6
    plain = case.logits(ids, mode="off")
    moved = float((moved_logits(case.engine, ids, shift) - plain).abs().max())
    allowed = max(noise(case, ids, plain), moved)
    worst = 0.0
    for policy in policies.policy_names():
        for ratio in (0.0, 0.15, 0.6):
            logits = case.logits(ids, recompute_ratio=ratio, policy=policy)
            worst = max(worst, float((logits - plain).abs().max()))
    print(f"{len(ids)} tokens moved by {shift}: off by {worst:.2e} at most, allowed {allowed:.2e} (moving {moved:.2e})")
    assert worst <= allowed


def test_i3_plain_after_blended_is_plain(case: Case) -> None:
    ids = case.ids(case.prompt(3, chunks=6))
    plain = case.logits(ids, mode="off")
    allowed = noise(case, ids, plain)
    blended = case.logits(ids, recompute_ratio=0.0)
    after = first_logits(case, ids, mode="off")
    assert float((blended - plain).abs().max()) > allowed
    assert float((after - plain).abs().max()) <= allowed


@pytest.mark.parametrize("policy", [name for name in policies.policy_names() if name != "none"])
def test_i7_same_prompt_same_logits(case: Case, policy: str) -> None:
    """Again from the start, and again over its own blocks in the prefix cache."""
    ids = case.ids(case.prompt(4, chunks=6))
    allowed = noise(case, ids, case.logits(ids, mode="off"))
    first = case.logits(ids, policy=policy, forced_tokens=4)
    repeated = first_logits(case, ids, policy=policy, forced_tokens=4)
    again = case.logits(ids, policy=policy, forced_tokens=4)
    assert float((repeated - first).abs().max()) <= allowed
    assert float((again - first).abs().max()) <= allowed
    answer = case.engine.generate(case.prompt(5, chunks=6), max_tokens=2, blend={"policy": policy}, trace=True)
    assert (answer.stats.decision, answer.stats.policy) == ("blend", policy)
    assert answer.trace is not None
    assert len(answer.trace.recomputed) == answer.stats.recomputed_tokens
    told = [*answer.trace.deviations.values(), *([] if answer.trace.read is None else [answer.trace.read])]
    assert all(np.isfinite(measured.values).all() and measured.values.max() > 0 for measured in told)


@pytest.mark.parametrize("policy", ["hkvd", "hkvd_kv"])
def test_kernels_measure_what_the_backend_measures(
    case: Case, policy: str, choices: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second check layer rows are those that were chosen at the first: scattered, and on the GPU."""
    model = connectors(case.engine)[1]._worker._model
    if model.kernel_passes is None:
        pytest.skip("no kernels for this case")
    ids = case.ids(case.prompt(6, chunks=6))
    case.logits(ids, policy=policy, check_layers=(1, 3))
    monkeypatch.setattr(model, "kernel_passes", None)
    case.logits(ids, policy=policy, check_layers=(1, 3))
    with_kernels, without = (set(positions.tolist()) for positions in choices)
    shared = len(with_kernels & without) / min(len(with_kernels), len(without))
    print(f"{policy}: {len(with_kernels)} and {len(without)} chosen, {shared:.0%} shared")
    assert shared > 0.8  # the rest is rounding


def with_cold_text(case: Case, seed: int) -> str:
    """A prompt with a passage that is not warm between some that are."""
    before, question = case.prompt(seed, chunks=4).rsplit("Question", 1)
    cold = random_text(200 + seed, 1500)
    return f"{before}Passage 5: {cold}\n\nPassage 6: {CHUNKS[seed % 8]}\n\nQuestion{question}"


def test_kernels_leave_out_cold_chunks(
    case: Case, choices: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the question's pass does not read is poisoned, for the kernels and for the backend."""
    model = connectors(case.engine)[1]._worker._model
    if model.kernel_passes is None:
        pytest.skip("no kernels for this case")
    asked: list[int] = []
    leaving_out = PagedForward.leaving_out

    def record(self: PagedForward, rows: torch.Tensor, unread: torch.Tensor) -> AskedPrompt:
        asked.append(len(unread))
        return leaving_out(self, rows, unread)

    monkeypatch.setattr(PagedForward, "leaving_out", record)
    ids = case.ids(with_cold_text(case, 6))
    fast = case.logits(ids)
    monkeypatch.setattr(model, "kernel_passes", None)
    simple = case.logits(ids)
    assert torch.isfinite(fast).all() and torch.isfinite(simple).all()
    assert min(asked) >= 128 and len(asked) == 2
    with_kernels, without = (set(positions.tolist()) for positions in choices)
    shared = len(with_kernels & without) / min(len(with_kernels), len(without))
    print(f"{asked[0]} tokens left out, {shared:.0%} of the choice shared")
    assert shared > 0.8  # the rest is rounding


class _Gives:
    """A policy that is not ours, which chooses on the GPU."""

    reads_question = False
    adapts = False

    def __init__(self, positions: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._positions = positions

    def cost(self, *args: object) -> float:
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        yield from ()
        return "mine", self._positions(layout.matched[:8].cuda())


@pytest.mark.parametrize(
    ("positions", "what"),
    [
        (lambda matched: matched, ""),
        (lambda matched: matched.flip(0), "must return ascending positions"),
        (lambda matched: matched[[0, 0]], "must return ascending positions"),
        (lambda matched: matched + 10**6, "chose a position"),
        (lambda matched: matched - 10**6, "chose a position"),
    ],
    ids=["good", "unsorted", "repeated", "behind the end", "negative"],
)
def test_choices_of_others_are_checked_on_the_gpu(
    case: Case, positions: Callable[[torch.Tensor], torch.Tensor], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(policies._POLICIES, "mine", _Gives(positions))
    forget_prefixes(case.engine)
    stats = case.engine.generate(case.prompt(5, chunks=6), max_tokens=1, blend={"policy": "mine"}).stats
    assert stats.decision == ("prefill" if what else "blend")
    assert ("blending failed: policy 'mine' " + what in stats.reason) == bool(what)


def test_chunks_on_the_gpu_leave_vllm_what_it_has_planned_for(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    model = connectors(case.engine)[1]._worker._model
    free, total = torch.cuda.mem_get_info(model.kv.device)
    planned = model.vllm_config.cache_config.gpu_memory_utilization * total
    assert 0 <= kernel_passes._bounded(total, model) <= min(max(total - planned, 0), free)
    assert "lower gpu_memory_utilization to have more" in caplog.text
    assert kernel_passes._bounded(0, model) == 0


def test_concurrent_requests(case: Case) -> None:
    """Blended and plain requests side by side, with asynchronous scheduling where vLLM has it on."""
    prompts = [case.prompt(seed, chunks=4) for seed in range(20, 26)]
    modes = ["blend", "off"] * 3

    def ask(prompt: str, mode: str) -> Generation:
        return case.engine.generate(prompt, max_tokens=16, logprobs=20, blend={"mode": mode})

    allowed = 2 * noise(case, ids := case.ids(prompts[1]), case.logits(ids, mode="off"))  # log-probabilities move more
    expected = []
    for prompt, mode in zip(prompts, modes, strict=True):
        forget_prefixes(case.engine)
        expected.append(ask(prompt, mode))
    forget_prefixes(case.engine)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, prompts, modes))
    assert [answer.stats.decision == "blend" for answer in answers] == [True, False] * 3
    assert max(map(first_difference, answers, expected)) <= allowed
    assert not connectors(case.engine)[0].faults and not connectors(case.engine)[1].faults


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
def test_blends_of_a_step_share_their_passes(case: Case, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [case.prompt(seed, chunks=2 + seed % 2) for seed in range(60, 64)]
    settings: dict[str, Any] = {"max_tokens": 1, "logprobs": 20, "blend": {"mode": "blend", "policy": policy}}
    allowed = 2 * noise(case, ids := case.ids(prompts[1]), case.logits(ids, mode="off"))
    expected = alone(case, prompts, **settings)
    passes = connectors(case.engine)[1]._worker._model.kernel_passes
    if passes is None:
        pytest.skip("no kernels for this case")
    recompute, packed = passes.recompute, []

    def count(rows: Any) -> None:
        packed.append(len(rows))
        recompute(rows)

    monkeypatch.setattr(passes, "recompute", count)
    monkeypatch.setattr(connectors(case.engine)[0]._scheduler, "_step_rows", 10**6)
    answers = together(case.engine, [(prompt, settings) for prompt in prompts])
    assert max(packed) >= 3  # a step has room for so many of these prompts, or for all four
    assert [answer.stats.decision for answer in answers] == ["blend"] * 4
    assert max(map(first_difference, answers, expected)) <= allowed


def first_difference(mine: Generation, theirs: Generation) -> float:
    """Between the log-probabilities of two first tokens."""
    assert mine.logprobs is not None and theirs.logprobs is not None
    shared = mine.logprobs[0].keys() & theirs.logprobs[0].keys()
    assert len(shared) > 5
    return max(abs(mine.logprobs[0][token] - theirs.logprobs[0][token]) for token in shared)


def by_both_paths(case: Case, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Full reuse with the kernels, and without; nothing is selected, so that no near tie decides."""
    ids = case.ids(case.prompt(55, chunks=6))
    fast = case.logits(ids, recompute_ratio=0.0)
    model = connectors(case.engine)[1]._worker._model
    with monkeypatch.context() as patch:
        patch.setattr(model, "kernel_passes", None)
        simple = case.logits(ids, recompute_ratio=0.0)
    return [fast, simple, case.logits(ids, mode="off")]


def test_kernels_give_what_the_simple_path_gives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if connectors(case.engine)[1]._worker._model.kernel_passes is None:
        pytest.skip("no kernels for this case")
    fast, simple, plain = by_both_paths(case, monkeypatch)
    apart, reuse = float((fast - simple).abs().max()), float((fast - plain).abs().max())
    allowed = noise(case, case.ids(case.prompt(55, chunks=6)), plain)
    print(f"paths {apart:.2e} apart, allowed {allowed:.2e}, full reuse is {reuse:.2e} from plain prefill")
    assert apart <= allowed
    assert allowed < reuse or is_coarse(case)


def test_chunks_of_8_bits(engines: Engines, smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded by the kernel that rotates and scatters, from pinned memory and from the GPU's own."""
    engine_args = {"max_model_len": 8192, "gpu_memory_utilization": 0.7, "enforce_eager": True, "gpu_bytes": 1 << 30}
    engine = engines.get(smollm2, dtype="bfloat16", codec="fp8", engine_args=engine_args)
    engine.warm(CHUNKS)
    case = Case(engine, CHUNKS)
    for _ in range(2):
        fast, simple, plain = by_both_paths(case, monkeypatch)
        apart, reuse = float((fast - simple).abs().max()), float((fast - plain).abs().max())
        print(f"paths {apart:.2e} apart, full reuse is {reuse:.2e} from plain prefill")
        assert apart <= noise(case, case.ids(case.prompt(55, chunks=6)), plain) < reuse


@pytest.fixture
def small(engines: Engines, smollm2: str) -> Case:
    """SmolLM2 with room for three prompts."""
    engine_args = {
        "num_gpu_blocks_override": 270,
        "max_num_seqs": 8,
        "block_size": 16,
        "max_model_len": 4096,
        "enforce_eager": True,
    }
    engine = engines.get(smollm2, dtype="bfloat16", engine_args=engine_args)
    engine.warm(CHUNKS)
    return Case(engine, CHUNKS)


def test_preempted_requests_go_on(small: Case) -> None:
    """What resumes after a preemption comes as a new request here."""
    prompts = [small.prompt(seed, chunks=4) for seed in range(30, 38)]
    modes = ["blend", "off"] * 4
    owner, preempted = scheduler(small.engine), []
    preempt = owner._preempt_request

    def count(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *args, **kwargs)

    def ask(prompt: str, mode: str) -> Generation:
        return small.engine.generate(prompt, max_tokens=100, logprobs=20, blend={"mode": mode})

    allowed = 2 * noise(small, ids := small.ids(prompts[1]), small.logits(ids, mode="off"))
    expected = []
    for prompt, mode in zip(prompts, modes, strict=True):
        forget_prefixes(small.engine)
        expected.append(ask(prompt, mode))
    forget_prefixes(small.engine)
    owner._preempt_request = count
    try:
        answers = list(ThreadPoolExecutor(8).map(ask, prompts, modes))
    finally:
        del owner._preempt_request
    print(f"{len(preempted)} preemptions of {[len(small.ids(prompt)) for prompt in prompts]} tokens")
    assert preempted
    assert max(map(first_difference, answers, expected)) <= allowed
    assert not connectors(small.engine)[0].faults and not connectors(small.engine)[1].faults


def test_a_blend_that_fails_is_prefilled(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("injected")

    ids = small.ids(small.prompt(40, chunks=4))
    plain = small.logits(ids, mode="off")
    allowed = noise(small, ids, plain)
    forget_prefixes(small.engine)
    with monkeypatch.context() as patch:
        patch.setattr("cacheblend_rag.vllm.worker_half.run_blends", explode)
        fallen_back = first_logits(small, ids)
    assert float((fallen_back - plain).abs().max()) <= allowed
    answers = list(ThreadPoolExecutor(4).map(lambda n: small.engine.generate(small.prompt(n)), range(41, 45)))
    assert all(answer.stats.decision == "blend" for answer in answers)


def test_constrained_answers(case: Case) -> None:
    """Decoding is constrained on a blended prompt, and a chunk is looked up and brought to memory meanwhile."""
    choices = ["a quiet harbour", "the old mill"]
    case.engine.prefetch(CHUNKS)
    prompt = case.prompt(50, chunks=4)
    chosen = case.engine.generate(prompt, max_tokens=24, structured_outputs={"choice": choices})
    assert chosen.text in choices
    assert chosen.stats.decision == "blend"
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    answers = list(
        ThreadPoolExecutor(4).map(
            lambda n: case.engine.generate(
                case.prompt(n, chunks=4), max_tokens=32, structured_outputs={"json": schema}
            ),
            range(51, 55),
        )
    )
    assert all(json.loads(answer.text)["yes"] in (True, False) for answer in answers)
    assert case.engine.is_warm([*CHUNKS, "cold text"]) == [True] * len(CHUNKS) + [False]
    assert not connectors(case.engine)[0].faults and not connectors(case.engine)[1].faults
