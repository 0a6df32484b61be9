"""I1 (ratio 1 is plain prefill), I2 (exact KV gives exact answers), I3 (no pollution), I4 (shifting), I7 (determinism)
on real vLLM: SmolLM2 and small random models of every kind, in float32, with poisoned KV."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cacheblend_rag import policies
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.matching import Segment
from cacheblend_rag.vllm.forward import PagedForward

from .conftest import (
    CHUNKS,
    MOE,
    WIDE,
    Case,
    Engines,
    computed_kv,
    connectors,
    forget_prefixes,
    inject_exact_kv,
    moved_logits,
)

TOLERANCE = 1e-4  # largest absolute difference of logits, float32
MODELS = ["smollm2", "llama3-scaled", "llama-yarn", "qwen2", "qwen3", "moe"]


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


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


@pytest.mark.parametrize("shift", [0, 97])
def test_i2_exact_kv_gives_exact_answers(
    case: Case, shift: int, monkeypatch: pytest.MonkeyPatch, random_policies: None
) -> None:
    """Chunk KV captured from the very prompt, there or at shifted positions: whatever is recomputed, it is exact."""
    ids = case.ids(case.prompt(7))
    segments = inject_exact_kv(case.engine, ids, shift, monkeypatch)
    assert len(segments) == 4
    assert any(segment.offset > 10 for segment in segments)

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
    prompts = [case.prompt(seed) for seed in range(2)]
    settings = {"max_tokens": 5, "blend": {"policy": policy}, "logprobs": 3}
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
