"""What changes logits by what prompt and answer hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag.engines.penalties import Penalties
from cacheblend_rag.engines.sampling import SamplingParams
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.errors import ConfigError

from .conftest import open_engine

VOCABULARY = 12
tokens = st.integers(0, VOCABULARY - 1)


@pytest.fixture(scope="module")
def engine(smollm2: str) -> Any:
    torch.set_num_threads(1)
    with open_engine(smollm2) as engine:
        yield engine


@settings(max_examples=100, deadline=None)
@given(
    st.lists(tokens),
    st.lists(tokens, max_size=6),
    st.floats(0.1, 3),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.dictionaries(tokens, st.floats(-100, 100), max_size=3),
    st.lists(st.floats(-20, 20), min_size=VOCABULARY, max_size=VOCABULARY),
)
def test_against_the_definition(
    prompt: list[int],
    answer: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    values: list[float],
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    penalties = Penalties(params, prompt, {0})
    for token in answer:
        penalties.add(token)
    logits = torch.tensor(values)
    changed = penalties.apply(logits.clone()).tolist()
    for token, value in enumerate(logits.tolist()):
        expected = value + bias.get(token, 0)
        if token in prompt or token in answer:
            expected = expected / repetition if expected > 0 else expected * repetition
        expected -= frequency * answer.count(token) + presence * (token in answer)
        assert changed[token] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_nothing_to_change() -> None:
    logits = torch.rand(VOCABULARY)
    assert Penalties(SamplingParams(), [1, 2], {0}).apply(logits) is logits


def test_ends(engine: TransformersEngine) -> None:
    prompt = "The capital of France is"
    plain = engine.generate(prompt, max_tokens=6)
    first, second = plain.token_ids[:2]
    stopped = engine.generate(prompt, max_tokens=6, stop_token_ids=[second])
    assert (stopped.token_ids, stopped.finish_reason) == ([first, second], "stop")
    assert stopped.text == engine.decode([first])
    eos = next(iter(engine._eos))
    ended = engine.generate(prompt, max_tokens=4, logit_bias={eos: 100})
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([eos], "", "stop")
    assert len(engine.generate(prompt, max_tokens=4, logit_bias={eos: 100}, ignore_eos=True).token_ids) == 4
    later = engine.generate(prompt, max_tokens=4, logit_bias={eos: 100}, min_tokens=2)
    assert later.token_ids == [*plain.token_ids[:2], eos]
    # A constraint that is fulfilled goes before the shortest answer.
    assert engine.generate(prompt, max_tokens=9, min_tokens=8, structured_outputs={"choice": ["no"]}).text == "no"


def test_min_p(engine: TransformersEngine) -> None:
    prompt = "The capital of France is"
    greedy = engine.generate(prompt, max_tokens=4)
    assert engine.generate(prompt, max_tokens=4, temperature=2.0, min_p=1.0, seed=1).token_ids == greedy.token_ids
    assert engine.generate(prompt, max_tokens=4, temperature=2.0, seed=1).token_ids != greedy.token_ids


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", "x"),
        ("repetition_penalty", 0),
        ("logit_bias", {1: 200}),
        ("logit_bias", {-1: 2}),
        ("logit_bias", {10**6: 2}),
        ("min_tokens", 5),
        ("ignore_eos", 1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**6]),
    ],
)
def test_bad_settings(engine: TransformersEngine, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        engine.generate("Hello", max_tokens=4, **{name: value})
