"""What a codec keeps of chunk KV."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.store.codecs import check_codec, decode, encode, stored_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_kv(seed: int, dtype: torch.dtype, magnitude: float = 1.0) -> torch.Tensor:
    """KV of two layers, 7 tokens and 3 heads."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 2, 7, 3, 8, generator=generator) * magnitude).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_is_bit_for_bit(dtype: torch.dtype) -> None:
    kv = make_kv(0, dtype)
    encoded, scales = encode(kv, "raw")
    assert scales is None
    assert torch.equal(decode(encoded, scales, dtype), kv)
    assert encoded.dtype == stored_dtype("raw", dtype) == dtype


@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES), exponent=st.integers(-4, 3))
def test_fp8_keeps_3_bits_of_mantissa(seed: int, dtype: torch.dtype, exponent: int) -> None:
    kv = make_kv(seed, dtype, 10.0**exponent)
    encoded, scales = encode(kv, "fp8")
    assert scales is not None and scales.dtype == torch.float32
    assert encoded.dtype == stored_dtype("fp8", dtype) == torch.float8_e4m3fn
    decoded = decode(encoded, scales, dtype)
    assert decoded.dtype == dtype
    # Half a unit in the last place, and the rounding of the model's own dtype, whose subnormal numbers are a fixed step
    # apart. What is far below the largest value of its layer and head loses more of itself, but nothing against that.
    largest = kv.float().abs().amax(dim=(2, 4), keepdim=True)
    subnormal_step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = kv.float().abs() * 2**-3.9 + largest * 2**-18 + subnormal_step / 2
    assert bool(((decoded.float() - kv.float()).abs() <= allowed).all())


def test_a_large_head_costs_the_others_nothing() -> None:
    kv = make_kv(1, torch.float32)
    alone = decode(*encode(kv, "fp8"), torch.float32)
    kv[:, 0, :, 1] *= 1e4
    beside = decode(*encode(kv, "fp8"), torch.float32)
    assert torch.equal(beside[:, :, :, [0, 2]], alone[:, :, :, [0, 2]])


def test_zeros_stay_zeros() -> None:
    assert not decode(*encode(torch.zeros(1, 2, 3, 1, 4), "fp8"), torch.float32).any()


def test_an_unknown_codec() -> None:
    with pytest.raises(ConfigError, match="codec must be one of raw, fp8, not 'zip'"):
        check_codec("zip")
