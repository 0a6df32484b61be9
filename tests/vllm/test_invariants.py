"""I1 (ratio 1 is plain prefill), I2 (exact KV gives exact answers), I3 (no pollution), I4 (shifting), I7 (determinism)
on real vLLM: SmolLM2 and small random models of every kind, in float32, with poisoned KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cacheblend_rag import policies
from cacheblend_rag.blending import BlendForward
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.vllm import VllmEngine
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.matching import Segment
from cacheblend_rag.store import MemoryStore
from cacheblend_rag.vllm.forward import PagedForward, run_rows

from .conftest import CHUNKS, MOE, WIDE, Case, Engines, connectors, forget_prefixes

TOLERANCE = 1e-4  # largest absolute difference of logits, float32
MODELS = ["smollm2", "llama3-scaled", "llama-yarn", "qwen2", "qwen3", "moe"]


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@torch.inference_mode()
def computed_kv(engine: VllmEngine, ids: list[int], shift: int) -> torch.Tensor:
    """The KV of some tokens by the engine's own model when they stand at ``shift ..``, with nothing before them."""
    model = connectors(engine)[1]._worker._model
    blocks = torch.arange(1, 2 + len(ids) // model.kv.block_size)
    places = torch.arange(len(ids))
    run_rows(model, torch.tensor(ids), places, places + shift, blocks)
    return PagedForward(model, torch.tensor(ids), blocks.tolist(), 0).read(0, len(ids))


@torch.inference_mode()
def moved_logits(engine: VllmEngine, ids: list[int], shift: int) -> torch.Tensor:
    """The logits after some tokens when all of them stand ``shift`` positions later."""
    model = connectors(engine)[1]._worker._model
    places = torch.arange(len(ids))
    blocks = torch.arange(1, 2 + len(ids) // model.kv.block_size)
    hidden = run_rows(model, torch.tensor(ids), places, places + shift, blocks)
    logits: torch.Tensor = model.model.compute_logits(hidden[-1:])[0].float()
    return logits


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, make_model: Callable[..., str]) -> str:
    if request.param == "smollm2":
        path: str = request.getfixturevalue("smollm2")
        return path
    return make_model(request.param, **WIDE, **(MOE if request.param == "moe" else {}))


@pytest.fixture
def case(engines: Engines, directory: str) -> Case:
    engine = engines.get(directory)
    engine.warm(CHUNKS)
    return Case(engine, CHUNKS)


@pytest.mark.parametrize("seed", range(3))
def test_i1_ratio_one_is_plain_prefill(case: Case, seed: int) -> None:
    prompt = case.prompt(seed)
    plain = case.logits(prompt, mode="off")
    assert max_difference(case.logits(prompt, recompute_ratio=1.0), plain) < TOLERANCE
    # The tolerance means something: reuse without recomputing is far outside of it.
    assert max_difference(case.logits(prompt, recompute_ratio=0.0), plain) > 100 * TOLERANCE


def test_plain_prefill_is_that_of_transformers(case: Case, directory: str) -> None:
    """What the other tests compare with is right."""
    ids = case.ids(case.prompt(0))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0, -1]
    assert max_difference(case.logits(ids, mode="off"), expected) < 1e-3 * float(expected.abs().max())


class _RandomChoice:
    """A policy that chooses anything it may."""

    reads_question = True

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def select(
        self, forward: BlendForward, layout: PromptLayout, budget: int, config: BlendConfig
    ) -> tuple[str, torch.Tensor]:
        order = torch.randperm(len(layout.matched), generator=self._generator)[:budget]
        return "random", layout.matched[order].sort().values


@pytest.fixture
def random_policies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(3):
            patch.setitem(policies._POLICIES, f"random{seed}", _RandomChoice(seed))
        yield


@pytest.mark.parametrize("shift", [0, 97])
def test_i2_exact_kv_gives_exact_answers(
    case: Case, shift: int, monkeypatch: pytest.MonkeyPatch, random_policies: None
) -> None:
    """Chunk KV captured from the very prompt, there or at shifted positions: whatever is recomputed, it is exact."""
    ids = case.ids(case.prompt(7))
    scheduler_side, worker_side = connectors(case.engine)
    scope = case.engine.scope
    segments = scheduler_side._scheduler._library.match(np.asarray(ids, np.int32))
    assert len(segments) == 4
    assert any(segment.offset > 10 for segment in segments)
    kv = computed_kv(case.engine, ids, shift)

    store = MemoryStore(1 << 30)
    for segment in segments:
        chunk_ids = scheduler_side._scheduler._library.store.ids(segment.key)
        first = segment.start - segment.offset
        exact = kv[:, :, first : first + len(chunk_ids)].contiguous()
        store.put(ChunkKV(segment.key, scope, chunk_ids, first + shift, exact))
    monkeypatch.setattr(worker_side._worker, "_store", store)

    plain = case.logits(ids, mode="off")
    # Captured at other positions, KV has the rounding of other angles: no better than the model's own logits there.
    tolerance = max(TOLERANCE, max_difference(moved_logits(case.engine, ids, shift), plain))
    assert tolerance < 5 * TOLERANCE
    for policy in policies.policy_names():
        for ratio in (0.0, 0.1, 0.5, 0.95):
            logits = case.logits(ids, recompute_ratio=ratio, policy=policy)
            assert max_difference(logits, plain) < tolerance, (policy, ratio)


def test_i3_plain_after_blended_is_plain(case: Case) -> None:
    prompt = case.prompt(3)
    forget_prefixes(case.engine)
    before = case.engine.generate(prompt, max_tokens=8, blend={"mode": "off"}, logprobs=5)
    forget_prefixes(case.engine)
    blended = case.engine.generate(prompt, max_tokens=8, blend={"recompute_ratio": 0.0}, logprobs=5)
    after = case.engine.generate(prompt, max_tokens=8, blend={"mode": "off"}, logprobs=5)
    assert blended.stats.decision == "blend"
    assert blended.logprobs != before.logprobs
    assert after.logprobs == before.logprobs
    assert after.token_ids == before.token_ids


@pytest.mark.parametrize(("old", "new"), [(0, 1), (3, 700), (900, 11), (1500, 1501)])
def test_i4_shifted_keys_are_those_computed_there(case: Case, old: int, new: int) -> None:
    rng = np.random.default_rng(old)
    ids = rng.integers(0, 250, size=33).astype(np.int32)
    computed = {position: computed_kv(case.engine, ids.tolist(), position) for position in (old, new)}
    model = connectors(case.engine)[1]._worker._model
    room = max(old, new) + len(ids)
    blocks = list(range(1, 2 + room // model.kv.block_size))
    forward = PagedForward(model, torch.zeros(room, dtype=torch.int64), blocks, 0)
    with torch.inference_mode():
        forward.place([(ChunkKV("", case.engine.scope, ids, old, computed[old]), Segment(new, len(ids), "", 0))])
        shifted = forward.read(new, room - max(old, new) + new)
        forward.place([(ChunkKV("", case.engine.scope, ids, new, shifted), Segment(old, len(ids), "", 0))])
        back = forward.read(old, old + len(ids))
    scale = float(computed[new][0, 0].abs().max())
    assert max_difference(shifted[0, 0], computed[new][0, 0]) < 1e-5 * scale
    assert max_difference(computed[old][0, 0], computed[new][0, 0]) > 1e-2 * scale
    # In deeper layers what is shifted was computed at other positions, and that is where rounding comes from.
    assert max_difference(shifted, computed[new]) < 1e-3 * float(computed[new].abs().max())
    assert max_difference(back, computed[old]) < 1e-5 * float(computed[old].abs().max())
    assert torch.equal(back[:, 1], computed[old][:, 1])
    forget_prefixes(case.engine)


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
def test_i7_same_prompt_same_tokens_and_batch_as_alone(case: Case, policy: str) -> None:
    prompts = [case.prompt(seed) for seed in range(3)]
    settings = {"max_tokens": 8, "blend": {"policy": policy}, "logprobs": 3}
    forget_prefixes(case.engine)
    alone = [case.engine.generate(p, **settings) for p in prompts]
    repeated = [case.engine.generate(p, **settings) for p in prompts]  # over their own blocks in the prefix cache
    forget_prefixes(case.engine)
    again = [case.engine.generate(p, **settings) for p in prompts]
    forget_prefixes(case.engine)
    batch = case.engine.generate(prompts, **settings)
    for answers in (repeated, again, batch):
        assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
        assert all(a.stats.decision in ("blend", "prefix") for a in answers)
        for mine, theirs in zip(answers, alone, strict=True):
            assert mine.logprobs is not None and theirs.logprobs is not None
            for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert all(abs(a[t] - b[t]) < TOLERANCE for t in a.keys() & b.keys())
