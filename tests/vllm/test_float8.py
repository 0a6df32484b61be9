"""Chunks kept as 8-bit floats, and a KV cache of such."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cacheblend_rag.errors import UnsupportedModelError
from cacheblend_rag.matching import Segment
from cacheblend_rag.store.codecs import decode
from cacheblend_rag.vllm.forward import PagedForward
from cacheblend_rag.vllm.paged_kv import PagedKV

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


class FakeLayer:
    """An attention layer whose cache of 8-bit floats, plain bytes as vLLM keeps them, is laid out its own way."""

    num_kv_heads, head_size, page = 3, 4, 8

    def __init__(self, key_scale: float, value_scale: float) -> None:
        self.kv_cache = torch.zeros(5, self.num_kv_heads, self.page, 2 * self.head_size, dtype=torch.uint8)
        self._k_scale, self._v_scale = torch.tensor(key_scale), torch.tensor(value_scale)
        self.impl = self

    def do_kv_cache_update(self, layer: object, keys: torch.Tensor, values: torch.Tensor, *cache_and_slots) -> None:
        cache, slots = cache_and_slots
        scaled = torch.cat([keys / self._k_scale, values / self._v_scale], dim=-1)
        cache.view(torch.float8_e4m3fn)[slots // self.page, :, slots % self.page] = scaled.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.013, 0.37), (5.1, 0.002)])
def test_a_paged_cache_of_8_bits_is_read_back(scales: tuple[float, float]) -> None:
    layers = [FakeLayer(*scales), FakeLayer(0.2, 0.3)]
    kv = PagedKV(layers, FakeLayer.page, 5, torch.float32)
    assert kv.is_float8 and kv.is_strided and kv.dtype == torch.float32
    assert not any(layer.kv_cache.any() for layer in layers)  # what was there before is there again
    generator = torch.Generator().manual_seed(0)
    slots = torch.randperm(5 * FakeLayer.page, generator=generator)[:20]
    keys, values = torch.randn(2, 20, FakeLayer.num_kv_heads, FakeLayer.head_size, generator=generator)
    for number, layer in enumerate(layers):
        keys, values = keys * layer._k_scale, values * layer._v_scale
        kv.write(number, keys, values, slots)
        blocks = torch.arange(5)
        for read, written, scale in (
            (kv.read_keys(number, blocks)[slots], keys, layer._k_scale),
            (kv.read_values(number, blocks)[slots], values, layer._v_scale),
            (kv.keys_at(number, blocks, slots), keys, layer._k_scale),
            (kv.values_at(number, blocks, slots), values, layer._v_scale),
        ):
            torch.testing.assert_close(read, written, rtol=2**-4, atol=float(scale) * 2**-10)
        views = [view.float() for view in kv.views(number)]
        torch.testing.assert_close(views[0].flatten(0, 1) * layer._k_scale, kv.read_keys(number, blocks))
        torch.testing.assert_close(views[1].flatten(0, 1) * layer._v_scale, kv.read_values(number, blocks))


def test_scales_of_each_head_are_refused() -> None:
    layer = FakeLayer(1.0, 1.0)
    layer._k_scale = torch.ones(3)
    with pytest.raises(UnsupportedModelError, match="scales of their own"):
        PagedKV([layer], FakeLayer.page, 5, torch.float32)


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
