"""Scores of given continuations: what the model expects over blended KV, against the same model without us."""

from __future__ import annotations

import pytest
import torch

from cacheblend_rag import ConfigError, PromptTooLongError
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.errors import EngineClosedError

from .conftest import Case, open_engine

TOLERANCE = 1e-4  # largest absolute difference of logits, float32
OFF = {"mode": "off"}


def decoded_logits(engine: TransformersEngine, ids: list[int], continuation: list[int], ratio: float) -> torch.Tensor:
    """The same token by token, as answers are generated."""
    scores = engine.score(ids, [continuation[:1]], blend={"recompute_ratio": ratio})
    config = engine.blend.with_overrides({"recompute_ratio": ratio})
    read = engine._reader.read_prompt(engine._prompt_ids(ids), len(ids) + len(continuation), config)
    with torch.inference_mode():
        rest = [read.forward.decode(token) for token in continuation[:-1]]
    return torch.cat([scores.logits[0], *(logits[None] for logits in rest)])


def test_full_prefill_scores_as_the_model_does(case: Case) -> None:
    ids = case.ids(case.prompt(1))
    continuation = case.ids("of two words")
    (logits,) = case.engine.score(ids, [continuation], blend=OFF).logits
    with torch.inference_mode():
        expected = case.reference(torch.tensor([ids + continuation])).logits[0, len(ids) - 1 : -1]
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) < TOLERANCE


def test_a_blend_scores_as_it_answers(case: Case) -> None:
    ids = case.ids(case.prompt(2))
    continuation = case.ids("of two words")
    ratio = 0.3
    scores = case.engine.score(ids, [continuation], blend={"recompute_ratio": ratio})
    assert scores.stats.decision == "blend"
    assert float((scores.logits[0] - decoded_logits(case.engine, ids, continuation, ratio)).abs().max()) < TOLERANCE
    (plain,) = case.engine.score(ids, [continuation], blend=OFF).logits
    assert float((scores.logits[0] - plain).abs().max()) > 100 * TOLERANCE


def test_continuations_do_not_see_each_other(case: Case) -> None:
    prompt = case.prompt(3)
    texts = ["a rather long continuation", "", "a rather short one"]
    together = case.engine.score(prompt, texts)
    for text, ids, logits in zip(texts, together.token_ids, together.logits, strict=True):
        alone = case.engine.score(case.ids(prompt), [ids])
        assert case.engine.decode(ids) == text
        assert len(logits) == len(ids)
        assert torch.equal(logits, alone.logits[0])


def test_an_answer_is_what_its_scores_expect(case: Case) -> None:
    prompt = case.prompt(4)
    answer = case.engine.generate(prompt, max_tokens=6, logprobs=0)
    (logits,) = case.engine.score(prompt, [answer.token_ids]).logits
    assert logits.argmax(-1).tolist() == answer.token_ids
    assert answer.logprobs is not None
    for token, row, logprobs in zip(answer.token_ids, logits.log_softmax(-1), answer.logprobs, strict=True):
        assert float(row[token]) == pytest.approx(logprobs[token], abs=TOLERANCE)


def test_scores_of_nothing_and_bad_input(random_models: dict[str, str]) -> None:
    with open_engine(random_models["qwen2"]) as engine:
        assert engine.score("A prompt", []).logits == []
        assert engine.counts["prefill"] == 1
        with pytest.raises(ConfigError, match="a continuation: there are token ids outside"):
            engine.score("A prompt", [[1, 10**6]])
        with pytest.raises(ConfigError, match="unknown blend setting"):
            engine.score("A prompt", ["text"], blend={"ratio": 1})
        with pytest.raises(PromptTooLongError):
            engine.score("A prompt", [[1] * engine.context_window])
        with pytest.raises(ConfigError, match="list of continuations"):
            engine.score("A prompt", "text")
    with pytest.raises(EngineClosedError):
        engine.score("A prompt", ["text"])
