"""Rotating and scattering chunk KV against plain torch, in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cacheblend_rag.rope import RotaryTable, rotate_keys

pytest.importorskip("triton")

from cacheblend_rag.vllm.placing import Runs, place_layers, work_items

from .test_paged import interpreted

LAYERS, PAGE, OFFSET = 3, 16, 2
LENGTHS = [11, 8, 3]


def place_and_check(heads: int, local: int, head_dim: int, half: int, dtype: torch.dtype, device: str) -> None:
    """All but the first heads of runs of three chunks, in two launches."""
    generator = torch.Generator().manual_seed(head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    chunks = [random(LAYERS, 2, n + 5, heads, head_dim).to(device, dtype) for n in LENGTHS]
    tokens = sum(LENGTHS)
    caches = [torch.zeros(20, PAGE, local, 2 * head_dim, dtype=dtype, device=device) for _ in range(LAYERS)]
    views = [cache.split(head_dim, dim=-1) for cache in caches]
    slots = torch.randperm(20 * PAGE, generator=generator)[:tokens].to(device)
    cos, sin = random(2, tokens, half).to(device)
    first = heads - local
    runs = Runs(
        torch.tensor([chunk[0, 0, OFFSET, first].data_ptr() for chunk in chunks], device=device),
        torch.tensor([1, 1, 0], dtype=torch.int32, device=device),
        torch.tensor([chunk.stride(0) for chunk in chunks], device=device),
        torch.tensor([chunk.stride(1) for chunk in chunks], device=device),
        *work_items(LENGTHS).to(device),
        slots,
        cos,
        sin,
    )
    addresses = torch.tensor([[keys.data_ptr(), values.data_ptr()] for keys, values in views], device=device)
    place_layers(runs, addresses, 0, 2, *views[0], heads * head_dim)
    # The last one is not there as a whole: what is placed next begins at its address.
    shift = torch.tensor([0, 0, 2], device=device) * runs.layer_strides * dtype.itemsize
    place_layers(
        dataclasses.replace(runs, addresses=runs.addresses + shift), addresses, 2, 1, *views[0], heads * head_dim
    )
    sources = [
        torch.cat([chunk[:, i, OFFSET : OFFSET + n, first:] for chunk, n in zip(chunks, LENGTHS, strict=True)], dim=1)
        for i in (0, 1)
    ]
    for layer, (keys, values) in enumerate(views):
        expected = torch.empty_like(sources[0][layer])
        rotate_keys(sources[0][layer], RotaryTable(cos, sin), out=expected)
        at = slots // PAGE, slots % PAGE
        torch.testing.assert_close(keys[at], expected)
        assert torch.equal(values[at], sources[1][layer])
        assert int((caches[layer] != 0).sum()) == 2 * expected.numel()  # and nothing anywhere else


@interpreted
@pytest.mark.parametrize(
    ("heads", "local", "head_dim", "half", "dtype"),
    [(4, 4, 64, 32, torch.float32), (6, 3, 80, 40, torch.float16), (4, 2, 64, 16, torch.float32)],
)
def test_runs_are_rotated_and_scattered(heads: int, local: int, head_dim: int, half: int, dtype: torch.dtype) -> None:
    place_and_check(heads, local, head_dim, half, dtype, "cpu")


def test_work_items_cover_every_token_once() -> None:
    run, start, token, length = work_items([17, 1, 8])
    assert run.tolist() == [0, 0, 0, 1, 2]
    assert start.tolist() == [0, 8, 16, 0, 0]
    assert token.tolist() == [0, 8, 16, 17, 18]
    assert length.tolist() == [8, 8, 1, 1, 8]
