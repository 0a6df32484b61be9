"""The invariants of the blend: I1 (ratio 1 is plain prefill), I2 (exact KV gives exact answers), I3 (no pollution),
I4 (shifting), I7 (determinism), on every architecture in float32 with poisoned buffers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cacheblend_rag import policies
from cacheblend_rag.budget import Budget
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.passes import Selection
from cacheblend_rag.store import MemoryStore
from cacheblend_rag.store.meter import ReadMeter

from .conftest import Case

TOLERANCE = 1e-4  # largest absolute difference of logits, float32


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_i1_ratio_one_is_plain_prefill(case: Case) -> None:
    for seed in range(1 if case.real else 3):
        ids = case.ids(case.prompt(seed))
        plain = case.plain_logits(ids)
        assert max_difference(case.logits(ids, recompute_ratio=1.0), plain) < TOLERANCE
        # The tolerance means something: reuse without recomputing is far outside of it.
        assert max_difference(case.logits(ids, recompute_ratio=0.0), plain) > 100 * TOLERANCE


def test_recomputing_more_comes_closer(case: Case) -> None:
    """Not an identity for each prompt, but on average it must hold or selection is broken."""
    prompts = [case.ids(case.prompt(seed)) for seed in range(2 if case.real else 3)]
    plain = [case.plain_logits(ids).log_softmax(-1) for ids in prompts]

    def divergence(policy: str, ratio: float) -> float:
        blended = [case.logits(ids, recompute_ratio=ratio, policy=policy).log_softmax(-1) for ids in prompts]
        return float(np.mean([float((p.exp() * (p - b)).sum()) for p, b in zip(plain, blended, strict=True)]))

    reused = divergence("none", 0.0)
    for policy in case.policies:
        assert divergence(policy, 0.9) < reused, policy


class _RandomChoice:
    """A policy that chooses anything it may."""

    reads_question = True
    adapts = False

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def cost(self, *args: object) -> float:
        return 0.0

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        yield from ()
        order = torch.randperm(len(layout.matched), generator=self._generator)[: budget.ceiling]
        return "random", layout.matched[order].sort().values


@pytest.mark.parametrize("shift", [0, 1, 97])
def test_i2_exact_kv_gives_exact_answers(case: Case, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk KV captured from the very prompt, there or at shifted positions: whatever is recomputed, it is exact."""
    ids = case.ids(case.prompt(7))
    library = case.engine.library
    layout = PromptLayout.of_prompt(
        np.asarray(ids, np.int32),
        library.match(np.asarray(ids, np.int32)),
        np.asarray(library.scope.primer_ids, np.int32),
    )
    assert len(layout.segments) == case.passages
    assert any(segment.offset > 10 for segment in layout.segments)
    with torch.inference_mode():
        positions = torch.arange(len(ids))[None] + shift
        captured = case.reference(torch.tensor([ids]), position_ids=positions, use_cache=True).past_key_values
    kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2) for layer in captured.layers])

    store = MemoryStore(1 << 30)
    for segment in layout.segments:
        chunk_ids = library.store.ids(segment.key)
        assert chunk_ids is not None
        first = segment.start - segment.offset
        exact = kv[:, :, first : first + len(chunk_ids)].contiguous()
        store.put(ChunkKV(segment.key, library.scope, chunk_ids, first + shift, exact))
    monkeypatch.setattr(case.engine._reader, "_library", ChunkLibrary(store, library.scope))
    monkeypatch.setattr(case.engine._reader, "meter", ReadMeter(store))
    for seed in range(3):
        monkeypatch.setitem(policies._POLICIES, f"random{seed}", _RandomChoice(seed))

    selections: list[tuple[str, Any]] = [(policy, "auto") for policy in case.policies]
    selections += itertools.product((*case.policies, "random0", "random1", "random2"), (0.0, 0.1, 0.5, 0.95))
    if case.real:
        selections = [("hkvd", 0.1), ("query_aware", 0.1), ("random0", 0.5)] if shift == 97 else [("query_aware", 0.0)]
    plain = case.plain_logits(ids)
    for policy, ratio in selections:
        logits = case.logits(ids, recompute_ratio=ratio, policy=policy)
        assert max_difference(logits, plain) < TOLERANCE, (policy, ratio)


def test_i3_plain_after_blended_is_plain(case: Case) -> None:
    prompt = case.prompt(3)
    before = case.engine.generate(prompt, max_tokens=8, blend={"mode": "off"}, logprobs=5)
    blended = case.engine.generate(prompt, max_tokens=8, blend={"recompute_ratio": 0.0}, logprobs=5)
    after = case.engine.generate(prompt, max_tokens=8, blend={"mode": "off"}, logprobs=5)
    assert blended.stats.decision == "blend"
    assert blended.logprobs != before.logprobs
    assert after.logprobs == before.logprobs
    assert after.token_ids == before.token_ids


@pytest.mark.parametrize(("old", "new"), [(0, 1), (3, 700), (900, 11), (1500, 1501)])
def test_i4_shifted_keys_are_those_computed_there(case: Case, old: int, new: int) -> None:
    rng = np.random.default_rng(old)
    ids = rng.integers(0, 250, size=33)
    with torch.inference_mode():
        at = {
            position: case.reference(
                torch.from_numpy(ids)[None], position_ids=position + torch.arange(len(ids))[None], use_cache=True
            ).past_key_values.layers[0]
            for position in (old, new)
        }
        kv = torch.stack([torch.stack([at[old].keys[0], at[old].values[0]]).transpose(1, 2)])
        layers, heads, head_dim = case.engine._loaded.kv_shape
        kv = kv.expand(layers, 2, len(ids), heads, head_dim)
        scope = case.engine.library.scope
        room = max(old, new) + len(ids)
        forward = case.engine._reader._forward(np.zeros(room, np.int32), case.engine._loaded.empty_kv(room))
        forward.place(ChunkKV("", scope, ids.astype(np.int32), old, kv), 0, len(ids), new)
        shifted = forward._kv[:, :, new : new + len(ids)].clone()
        expected = at[new].keys[0].transpose(0, 1)
        scale = float(expected.abs().max())
        assert max_difference(shifted[0, 0], expected) < 1e-5 * scale
        assert max_difference(kv[0, 0], expected) > 1e-2 * scale
        forward.place(ChunkKV("", scope, ids.astype(np.int32), new, shifted), 0, len(ids), old)
        back = forward._kv[:, :, old : old + len(ids)]
        assert max_difference(back[0, 0], kv[0, 0]) < 1e-5 * scale
        assert torch.equal(back[:, 1], kv[:, 1])


def test_i7_same_prompt_same_tokens_and_batch_as_alone(case: Case) -> None:
    prompts = [case.prompt(seed) for seed in range(2 if case.real else 3)]
    for policy, ratio in itertools.product(case.policies, ("auto",) if case.real else (0.15, "auto")):
        blend = {"policy": policy, "recompute_ratio": ratio}
        settings = {"max_tokens": 4 if case.real else 8, "blend": blend, "logprobs": 3}
        alone = [case.engine.generate(p, **settings) for p in prompts]
        again = [case.engine.generate(p, **settings) for p in prompts]
        batch = case.engine.generate(prompts, **settings)
        assert [g.token_ids for g in alone] == [g.token_ids for g in again] == [g.token_ids for g in batch], policy
        assert [g.logprobs for g in alone] == [g.logprobs for g in again] == [g.logprobs for g in batch], policy


def test_every_token_is_counted_once(case: Case) -> None:
    for policy, ratio in itertools.product(case.policies, (0.15, 1.0) if case.real else (0.0, 0.15, 0.29, 0.5, 1.0)):
        blend = {"recompute_ratio": ratio, "policy": policy, "forced_tokens": 3}
        answer = case.engine.generate(case.prompt(5), max_tokens=1, blend=blend)
        stats = answer.stats
        matched = sum(segment.length for segment in answer.segments) - stats.prefix_tokens
        assert stats.decision == "blend"
        assert stats.segments == case.passages
        assert stats.recomputed_tokens == int(round(ratio * matched, 6))
        assert stats.reused_tokens == matched - stats.recomputed_tokens
        counted = stats.prefix_tokens + stats.reused_tokens + stats.recomputed_tokens + stats.missed_tokens
        assert counted == stats.prompt_tokens
        parts = stats.match + stats.load + stats.select + stats.recompute + stats.first_token
        assert 0.5 * stats.ttft < parts <= stats.ttft


def test_auto_keeps_to_its_range(case: Case) -> None:
    for policy in case.policies:
        blend = {"recompute_ratio": "auto", "ratio_range": (0.1, 0.3), "policy": policy, "forced_tokens": 3}
        stats = case.engine.generate(case.prompt(5), max_tokens=1, blend=blend).stats
        matched = stats.reused_tokens + stats.recomputed_tokens
        assert int(0.1 * matched) <= stats.recomputed_tokens <= int(0.3 * matched)
        assert stats.prefix_tokens + matched + stats.missed_tokens == stats.prompt_tokens


def test_auto_without_a_range_is_a_fixed_ratio(case: Case) -> None:
    ids = case.ids(case.prompt(5))
    for policy in ("query_aware",) if case.real else (*case.policies, "random", "chunk_heads"):
        fixed = case.logits(ids, recompute_ratio=0.2, policy=policy)
        assert torch.equal(case.logits(ids, recompute_ratio="auto", ratio_range=(0.2, 0.2), policy=policy), fixed)
