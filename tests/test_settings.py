"""Settings that can't mean anything are refused where they are given, in one line that names them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import BlendConfig
from cacheblend_rag.engines.base import SamplingParams
from cacheblend_rag.errors import ConfigError

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "setting",
    [
        *({"recompute_ratio": value} for value in (-0.1, 1.1, NAN, INFINITY, True, "0.15", None)),
        *({"check_layers": value} for value in ((), (-1,), (1, 1), (2, 1), (True,), (1.0,))),
        *(
            {"question_layers": value}
            for value in ((), (1,), (1, 2, 3), (-1, 2), (2, 2), (3, 2), (0, 1.5), (True, 2), "12", 3, {0, 1}, [None, 4])
        ),
        *({name: value} for name in ("forced_tokens", "min_reused_tokens") for value in (-1, 1.5, True, None)),
        {"recompute_ratio": "most"},
        *({"ratio_range": value} for value in (0.1, None, "ab", (), (0.1,), (0.1, 0.2, 0.3), (0.1, "0.2"), (True, 1))),
        *({"ratio_range": value} for value in ((0.5, 0.1), (-0.1, 0.5), (0.1, 1.1), (NAN, 0.5), (0.1, INFINITY))),
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


def test_blend_settings_survive_json():
    config = BlendConfig(recompute_ratio="auto", ratio_range=(0, 0.4), check_layers=(1, 3))
    assert BlendConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict() == json.loads(json.dumps(config.to_dict()))


@given(
    ends=st.lists(st.integers(0, 80), min_size=2, max_size=2, unique=True).map(sorted),
    num_layers=st.integers(1, 80),
)
def test_question_layers_are_within_the_model(ends, num_layers):
    config = BlendConfig(check_layers=(0,), question_layers=ends)
    assert config.question_layers == tuple(ends)  # JSON has lists
    assert BlendConfig().with_overrides(json.loads(json.dumps(config.to_dict()))) == config
    if ends[1] <= num_layers:
        config.check_layer_numbers(num_layers)
    else:
        with pytest.raises(ConfigError, match=rf"question_layers .* {num_layers}, the layers of this model"):
            config.check_layer_numbers(num_layers)


def test_given_question_layers_win_over_the_models():
    assert BlendConfig(question_layers=(1, 2)).or_question_layers((3, 4)).question_layers == (1, 2)
    assert BlendConfig().or_question_layers((3, 4)).question_layers == (3, 4)
    assert BlendConfig().or_question_layers(None) == BlendConfig()


def test_whole_numbers_are_numbers():
    assert BlendConfig(recompute_ratio=1).recompute_ratio == 1
    assert SamplingParams(temperature=1, top_p=1).temperature == 1
