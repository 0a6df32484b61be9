"""Chunks kept as 8-bit floats, and a KV cache of such."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cacheblend_rag.matching import Segment
from cacheblend_rag.store.codecs import decode
from cacheblend_rag.vllm.forward import PagedForward

from .conftest import CHUNKS, Case, Engines, connectors, forget_prefixes, inject_exact_kv


@pytest.fixture
def case(engines: Engines, model: str) -> Case:
    """Its chunks are kept as 8-bit floats."""
    engine = engines.get(model, codec="fp8")
    engine.warm(CHUNKS)
    forget_prefixes(engine)
    return Case(engine, CHUNKS)


@torch.inference_mode()
def test_what_is_placed_is_what_was_kept(case: Case) -> None:
    worker = connectors(case.engine)[1]._worker
    chunk = worker._store.get(case.engine.chunk_keys(CHUNKS[:1])[0])
    assert chunk.kv.dtype == torch.float8_e4m3fn
    decoded = dataclasses.replace(chunk, kv=decode(chunk.kv, chunk.scales, torch.float32), scales=None)
    segment = Segment(start=40, length=60, key=chunk.key, offset=7)
    placed = []
    for piece in (chunk, decoded):
        forward = PagedForward(worker._model, torch.zeros(128, dtype=torch.int64), list(range(1, 9)), 0)
        forward.place([(piece, segment)])
        placed.append(forward.read(segment.start, segment.end))
    assert torch.equal(placed[0], placed[1])


def test_ratio_one_is_plain_prefill(case: Case) -> None:
    prompt = case.prompt(1)
    plain = case.logits(prompt, mode="off")
    assert float((case.logits(prompt, recompute_ratio=1.0) - plain).abs().max()) < 1e-4
    blended = case.engine.generate(prompt, max_tokens=1)
    assert blended.stats.decision == "blend" and blended.stats.faults == 0


@pytest.fixture
def cache_case(engines: Engines, model: str) -> Case:
    """Its KV cache holds 8-bit floats."""
    if torch.cuda.is_available() or not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's KV cache of 8-bit floats on a CPU needs AVX-512; GPUs have tests of their own")
    engine = engines.get(model, engine_args={"kv_cache_dtype": "fp8"})
    engine.warm(CHUNKS)
    forget_prefixes(engine)
    return Case(engine, CHUNKS)


def test_i1_with_a_cache_of_8_bits(cache_case: Case) -> None:
    prompt = cache_case.prompt(2)
    plain = cache_case.logits(prompt, mode="off")
    reuse = cache_case.logits(prompt, recompute_ratio=0.0)
    exact = cache_case.logits(prompt, recompute_ratio=1.0)
    assert float((exact - plain).abs().max()) < 1e-3 < float((reuse - plain).abs().max())


def test_i2_with_a_cache_of_8_bits(cache_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured where it is read again: a key that is shifted is rounded once more."""
    ids = cache_case.ids(cache_case.prompt(3))
    inject_exact_kv(cache_case.engine, ids, 0, monkeypatch)
    plain = cache_case.logits(ids, mode="off")
    for policy in ("hkvd", "query_aware"):
        blended = cache_case.logits(ids, policy=policy, recompute_ratio=0.15)
        assert float((blended - plain).abs().max()) < 1e-3
