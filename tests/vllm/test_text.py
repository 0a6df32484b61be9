"""The text of answers is what vLLM's own detokenizer makes of their tokens, which only stop strings need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cacheblend_rag import Generation
from cacheblend_rag.engines.base import SamplingParams
from cacheblend_rag.engines.decoding import TextStream
from cacheblend_rag.engines.vllm import VllmEngine

from .conftest import Engines

NEVER = "never there"
WORDS = [14, 15, 16]  # of the sentence tokenizer


def vllm_detokenizer(tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int], **params: Any) -> Any:
    """What vLLM decodes a request with."""
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    request: Any = SimpleNamespace(
        request_id="", sampling_params=VllmSamplingParams(**params), prompt_token_ids=prompt_ids
    )
    return FastIncrementalDetokenizer(tokenizer, request)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "sentence_tokenizer"])
def test_token_by_token_it_is_vllms(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(kind)
    token = st.integers(0, len(tokenizer) - 1)
    smile = tokenizer("😀", add_special_tokens=False)["input_ids"]
    tokens = (
        st.lists(st.one_of(token.map(lambda n: [n]), st.just(smile)), max_size=30)
        .map(itertools.chain.from_iterable)
        .map(list)
    )

    @settings(max_examples=300, deadline=None)
    @given(tokens, tokens, st.booleans())
    def check(prompt_ids: list[int], token_ids: list[int], skip: bool) -> None:
        if tokenizer.decode(prompt_ids, skip_special_tokens=skip).endswith("\ufffd"):
            return  # vLLM repeats such a prompt in the answer
        theirs = vllm_detokenizer(tokenizer, prompt_ids, skip_special_tokens=skip)
        mine = TextStream(tokenizer, prompt_ids, SamplingParams(skip_special_tokens=skip))
        for token_id in token_ids:
            theirs.update([token_id], False)
            assert mine.add(token_id) == theirs.get_next_output_text(finished=False, delta=True)

    check()


@pytest.fixture
def engine(engines: Engines, sentence_model: str) -> VllmEngine:
    return engines.get(sentence_model)


@pytest.fixture
def detokenized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests that vLLM detokenizes."""
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    seen: list[str] = []
    begin = FastIncrementalDetokenizer.__init__

    def watched(self: Any, tokenizer: Any, request: Any) -> None:
        seen.append(request.request_id)
        begin(self, tokenizer, request)

    monkeypatch.setattr(FastIncrementalDetokenizer, "__init__", watched)
    yield seen


def told(answer: Generation) -> tuple[Any, ...]:
    return answer.text, answer.token_ids, answer.finish_reason, answer.logprobs


SETTINGS: list[dict[str, Any]] = [
    {},
    {"skip_special_tokens": False},
    {"logprobs": 3},
    {"logit_bias": {2: 100.0}, "min_tokens": 3},  # ends as soon as it may
    {"logit_bias": {2: 100.0}, "skip_special_tokens": False},
    {"logit_bias": {2: 100.0}, "ignore_eos": True, "skip_special_tokens": False},
    {"logit_bias": {15: 100.0}, "stop_token_ids": [15]},
    {"logit_bias": {token: 50.0 for token in (3, 4, 5, 10, 14)}},  # whole characters, half ones, and words
    {"structured_outputs": {"regex": " Paris[a-c]{2,9}"}},
]


@pytest.mark.parametrize("arguments", SETTINGS, ids=str)
def test_answers_are_those_that_vllm_detokenizes(
    engine: VllmEngine, detokenized: list[str], arguments: dict[str, Any]
) -> None:
    for seed in range(3):
        call: dict[str, Any] = {"max_tokens": 24, "temperature": 1.0, "seed": seed, **arguments}
        answer = engine.generate("Where is a", **call)
        *pieces, last = engine.stream("Where is a", **call)
        assert not detokenized
        assert last.generation is not None
        assert "".join([*pieces, last]) == answer.text
        assert told(last.generation) == told(answer) == told(engine.generate("Where is a", **call, stop=NEVER))
        assert len(detokenized) == 1
        detokenized.clear()
        if 2 in arguments.get("logit_bias", {}):
            ended = not arguments.get("ignore_eos", False)
            assert answer.finish_reason == ("stop" if ended else "length")
            assert answer.token_ids[-1] == 2
            assert answer.text.endswith("<eos>") is not ended


def test_text_goes_on_from_the_prompt(engine: VllmEngine, detokenized: list[str]) -> None:
    call: dict[str, Any] = {"logit_bias": dict.fromkeys(WORDS, 100.0), "max_tokens": 5, "ignore_eos": True}
    answers = engine.generate(["Where is a", "a"], **call)
    assert [answer.text[0] for answer in answers] == [" ", " "]
    assert not detokenized
    assert engine.generate([1], **call).text[0] != " "


def test_a_stream_that_is_given_up(engine: VllmEngine) -> None:
    stream = engine.stream("Where is a", max_tokens=200, ignore_eos=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.generate("Where is a", max_tokens=2).token_ids
    assert not engine._thread._requests


def test_warming_detokenizes_nothing(engine: VllmEngine, detokenized: list[str]) -> None:
    assert engine.warm(["Paris is a place of a sort"]).stored == 1
    assert not detokenized
