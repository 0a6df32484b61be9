"""Settings that can't mean anything are refused where they are given, in one line that names them."""

import pytest

from cacheblend_rag import BlendConfig
from cacheblend_rag.engines.base import SamplingParams
from cacheblend_rag.errors import ConfigError

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "setting",
    [
        *({"recompute_ratio": value} for value in (-0.1, 1.1, NAN, INFINITY, True, "0.15", None)),
        *({"check_layers": value} for value in ((), (-1,), (1, 1), (2, 1), (True,), (1.0,))),
        *({name: value} for name in ("forced_tokens", "min_reused_tokens") for value in (-1, 1.5, True, None)),
        {"policy": "no such policy"},
        {"mode": "fast"},
    ],
    ids=str,
)
def test_bad_blend_settings(setting):
    with pytest.raises(ConfigError) as error:
        BlendConfig(**setting)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        BlendConfig().with_overrides(setting)


@pytest.mark.parametrize(
    "setting",
    [
        *({"max_tokens": value} for value in (0, -1, 1.5, True, None)),
        *({"temperature": value} for value in (-0.1, NAN, INFINITY, True, "1")),
        *({"top_p": value} for value in (0, 1.1, NAN, True)),
        *({"top_k": value} for value in (-2, 1.5, True)),
        *({"seed": value} for value in (1.5, True)),
        *({"logprobs": value} for value in (-1, 1.5, True)),
        {"stop": ("",)},
        {"stop": (1,)},
    ],
    ids=str,
)
def test_bad_sampling_settings(setting):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**setting)
    assert next(iter(setting)) in str(error.value) and "\n" not in str(error.value)


def test_whole_numbers_are_numbers():
    assert BlendConfig(recompute_ratio=1).recompute_ratio == 1
    assert SamplingParams(temperature=1, top_p=1).temperature == 1
