"""The kernels as they are compiled, on a CUDA GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
pytest.importorskip("triton")

from cacheblend_rag.attention.paged import attend_rows  # noqa: E402
from cacheblend_rag.attention.prefix import BUCKET, Buckets, attend_buckets  # noqa: E402

from .test_paged import SCALE, SHAPES, check, make_pages, watch_and_check  # noqa: E402
from .test_placing import place_and_check  # noqa: E402

# Of values around one: rounding of the result, and of the probabilities before they meet the values.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"head_dim {shape['head_dim']}")
def test_rows_see_what_is_up_to_them(shape: dict[str, Any], splits: int, dtype: torch.dtype) -> None:
    check(make_pages(**shape, dtype=dtype, device="cuda"), TOLERANCE[dtype], splits=splits)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_many_rows(dtype: torch.dtype) -> None:
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "sequences": 3, "rows": 100, "pages": 64}
    check(make_pages(**shape, dtype=dtype, device="cuda"), TOLERANCE[dtype])


def test_float8_cache() -> None:
    pages = make_pages(head_dim=128, dtype=torch.bfloat16, device="cuda")
    scale = 0.05
    keys, values = ((x.float() / scale).to(torch.float8_e4m3fn) for x in (pages.keys, pages.values))
    got = attend_rows(pages.query, keys, values, pages.rows, SCALE, key_scale=scale, value_scale=scale)
    pages.keys, pages.values = keys.float() * scale, values.float() * scale
    expected, _ = pages.reference()
    assert float((got.float().cpu() - expected).abs().max()) < 4e-2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("splits", [1, 4])
def test_watched_attention_is_that_of_the_rows(splits: int, dtype: torch.dtype) -> None:
    watch_and_check(make_pages(sequences=2, rows=30, dtype=dtype, device="cuda"), splits, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("gap", [(0, 0), (300, 1600)], ids=["close", "far apart"])
def test_going_on_from_flash_attention(gap: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    flash = pytest.importorskip("vllm.v1.attention.backends.fa_utils")
    if flash.get_flash_attn_version() != 3:
        pytest.skip("needs FlashAttention 3")
    shape = {"heads": 8, "kv_heads": 2, "sequences": 2, "rows": 300, "pages": 220, "unit": BUCKET}
    pages = make_pages(**shape, gap=gap, head_dim=head_dim, dtype=dtype, device="cuda")
    expected, _ = pages.reference()
    buckets = Buckets.of(pages.rows)
    got = attend_buckets(flash.flash_attn_varlen_func, pages.query, pages.keys, pages.values, buckets, SCALE)
    assert float((got.float().cpu() - expected).abs().max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "local", "head_dim", "half"), [(8, 8, 128, 64), (6, 3, 80, 40), (4, 2, 64, 16)])
def test_runs_are_rotated_and_scattered(heads: int, local: int, head_dim: int, half: int, dtype: torch.dtype) -> None:
    place_and_check(heads, local, head_dim, half, dtype, "cuda")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("codec", "float8_cache"), [("fp8", False), ("raw", True), ("fp8", True)])
def test_8_bit_floats_are_decoded_and_encoded(codec: str, float8_cache: bool, dtype: torch.dtype) -> None:
    place_and_check(6, 3, 80, 32, dtype, "cuda", codec=codec, float8_cache=float8_cache)
