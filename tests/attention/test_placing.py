"""Rotating and scattering chunk KV against plain torch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from cacheblend_rag.rope import RotaryTable, rotate_keys, shift_table
from cacheblend_rag.store.codecs import decode, encode

pytest.importorskip("triton")

from cacheblend_rag.vllm.placing import Runs, place_layers, work_items

from .test_paged import interpreted

LAYERS, PAGE, OFFSET = 3, 16, 2
LENGTHS = [11, 8, 3]
OLD, NEW = [5, 0, 40], [30, 3, 8]  # positions where runs begin; the last one goes to a prompt of its own
UNTOUCHED = 77.0


def place_and_check(
    heads: int,
    local: int,
    head_dim: int,
    half: int,
    dtype: torch.dtype,
    device: str,
    *,
    codec: str = "raw",
    float8_cache: bool = False,
) -> None:
    """All but the first heads of runs of three chunks, in two launches."""
    generator = torch.Generator().manual_seed(head_dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    encoded = [encode(random(LAYERS, 2, n + 5, heads, head_dim).to(device, dtype) * 3, codec) for n in LENGTHS]
    chunks = [kv for kv, _ in encoded]
    scales = [scale for _, scale in encoded]
    decoded = [decode(kv, scale, torch.float32) for kv, scale in encoded]
    in_cache = torch.float8_e4m3fn if float8_cache else dtype
    caches = [torch.full((20, PAGE, local, 2 * head_dim), UNTOUCHED, device=device).to(in_cache) for _ in range(LAYERS)]
    untouched = caches[0].flatten()[0].item()
    cache_scales = random(LAYERS, 2).abs().add(0.5).to(device)
    views = [cache.split(head_dim, dim=-1) for cache in caches]
    cos_sin = random(64, 2 * half).to(device, dtype)
    tables = torch.randperm(20, generator=generator)[:6].view(2, 3).to(device)
    table_of = [tables[0], tables[0], tables[1]]
    first = heads - local
    runs = Runs(
        torch.tensor(
            [
                [chunk[0, 0, OFFSET, first].data_ptr() for chunk in chunks],
                [1, 1, 0],
                [chunk.stride(0) for chunk in chunks],
                [chunk.stride(1) for chunk in chunks],
                OLD,
                NEW,
                [table.data_ptr() for table in table_of],
                [0 if scale is None else scale[0, 0, first].data_ptr() for scale in scales],
            ],
            device=device,
        ),
        work_items(LENGTHS).to(device),
        chunks[0].dtype,
        None,
    )
    addresses = torch.tensor([[keys.data_ptr(), values.data_ptr()] for keys, values in views], device=device)
    place_layers(runs, addresses, 0, 2, cos_sin, *views[0], cache_scales, heads * head_dim)
    # The last one is not there as a whole: what is placed next begins at its address.
    runs.table[0, 2] += 2 * chunks[2].stride(0) * chunks[2].itemsize
    place_layers(runs, addresses, 2, 1, cos_sin, *views[0], cache_scales, heads * head_dim)
    old, new = (
        torch.cat([torch.arange(n) + start for n, start in zip(LENGTHS, starts, strict=True)]).to(device)
        for starts in (OLD, NEW)
    )
    blocks = torch.cat(
        [
            table[(torch.arange(n, device=device) + start) // PAGE]
            for n, start, table in zip(LENGTHS, NEW, table_of, strict=True)
        ]
    )
    rotation = [RotaryTable(*cos_sin[at].float().chunk(2, dim=-1)) for at in (old, new)]
    shift = shift_table(*rotation)
    sources = [
        torch.cat([chunk[:, i, OFFSET : OFFSET + n, first:] for chunk, n in zip(decoded, LENGTHS, strict=True)], dim=1)
        for i in (0, 1)
    ]
    for layer, (keys, values) in enumerate(views):
        expected = torch.empty_like(sources[0][layer])
        rotate_keys(sources[0][layer], shift, out=expected)
        at = blocks, new % PAGE
        if float8_cache:
            wanted = zip((keys, values), (expected, sources[1][layer]), cache_scales[layer], strict=True)
            for found, exact, scale in wanted:
                # Rounding to 3 bits of mantissa, and below 2 ** -6 to multiples of 2 ** -9.
                exact = (exact.float() / scale).clamp(-448, 448)
                right = torch.ones_like(exact, dtype=torch.bool)
                if device == "cpu":  # Triton's interpreter loses the carry where rounding reaches a power of two
                    right &= exact.to(torch.float8_e4m3fn).float().frexp().mantissa.abs() != 0.5
                    right &= exact.abs() > 2**-6  # and cuts off below
                torch.testing.assert_close(found.float()[at][right], exact[right], rtol=2**-4, atol=2**-10)
        else:
            torch.testing.assert_close(keys[at], expected.to(dtype))
            torch.testing.assert_close(values[at], sources[1][layer].to(dtype), rtol=0, atol=0)
        rest = caches[layer].float()
        rest[at] = untouched
        assert bool((rest == untouched).all())


@interpreted
@pytest.mark.parametrize(
    ("heads", "local", "head_dim", "half", "dtype"),
    [(4, 4, 64, 32, torch.float32), (6, 3, 80, 40, torch.float16), (4, 2, 64, 16, torch.float32)],
)
def test_runs_are_rotated_and_scattered(heads: int, local: int, head_dim: int, half: int, dtype: torch.dtype) -> None:
    place_and_check(heads, local, head_dim, half, dtype, "cpu")


@interpreted
@pytest.mark.parametrize(("codec", "float8_cache"), [("fp8", False), ("raw", True), ("fp8", True)])
@pytest.mark.parametrize("half", [32, 16], ids=["all dimensions rotated", "some"])
def test_8_bit_floats_are_decoded_and_encoded(half: int, codec: str, float8_cache: bool) -> None:
    place_and_check(4, 2, 64, half, torch.float32, "cpu", codec=codec, float8_cache=float8_cache)


def test_work_items_cover_every_token_once() -> None:
    run, start, length = work_items([17, 1, 8])
    assert run.tolist() == [0, 0, 0, 1, 2]
    assert start.tolist() == [0, 8, 16, 0, 0]
    assert length.tolist() == [8, 8, 1, 1, 8]
