"""Tokens become text as they come: what continues a prompt, whole characters, no special tokens."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from cacheblend_rag.engines.base import SamplingParams
from cacheblend_rag.engines.decoding import TextStream

from .conftest import open_engine

PARIS, IS, A = 14, 15, 16
BOS = 1
SMILE = [9, 10, 11, 12]  # four bytes
EURO = [6, 7, 8]
LETTER_A, NEWLINE = 13, 3  # of one byte


@pytest.fixture
def tokenizer(sentence_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return sentence_tokenizer


def pieces(
    tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int], token_ids: list[int], **params: bool
) -> list[str]:
    """The text of each token, and of the end."""
    stream = TextStream(tokenizer, prompt_ids, SamplingParams(**params))
    said = [*map(stream.add, token_ids), stream.finish()]
    assert "".join(said) == stream.text
    return said


def test_the_tokenizer_is_what_it_should_be(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = ["▁Paris", "▁is", "▁a", "<s>", "<0x0A>", "<0x41>"]
    assert tokenizer.convert_ids_to_tokens([PARIS, IS, A, BOS, NEWLINE, LETTER_A]) == tokens
    assert tokenizer.decode([PARIS, IS, *SMILE, *EURO]) == "Paris is😀€"


@pytest.mark.parametrize(
    "prompt_ids",
    [[A], [A] * 3000, [A, *[BOS] * 9], [A, NEWLINE], [*SMILE * 3], [*EURO * 5]],
    ids=["word", "long", "special tokens last", "byte", "cut within a character", "cut twice within a character"],
)
def test_text_goes_on_from_the_prompt(tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int]) -> None:
    assert pieces(tokenizer, prompt_ids, [PARIS, IS]) == [" Paris", " is", ""]
    whole = tokenizer.decode([*prompt_ids, PARIS, IS], skip_special_tokens=True)
    assert whole == tokenizer.decode(prompt_ids, skip_special_tokens=True) + " Paris is"


@pytest.mark.parametrize(
    "prompt_ids", [[], [BOS], [A, *[BOS] * 64], [A, *SMILE[:2]], [A] * 100 + SMILE[:3]], ids=lambda ids: f"{ids[-5:]}"
)
def test_without_text_to_go_on_from_it_begins_anew(tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int]) -> None:
    """Nothing of the prompt gets into it, half a character neither."""
    assert pieces(tokenizer, prompt_ids, [PARIS, IS]) == ["Paris", " is", ""]


def test_half_characters_are_held_back(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, [A], [IS, *SMILE, PARIS]) == [" is", "", "", "", "😀", " Paris", ""]
    assert pieces(tokenizer, [A], [IS, NEWLINE, *SMILE[:3]]) == [" is", "\n", "", "", "", "\ufffd" * 3]


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, [A], [BOS, IS, BOS]) == ["", " is", "", ""]
    assert pieces(tokenizer, [A], [BOS, IS, BOS], skip_special_tokens=False) == ["<s>", " is", "<s>", ""]


def test_bytes_that_are_no_character_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """With them, the byte before is none either, and the text that went before would be another."""
    assert tokenizer.decode([A, LETTER_A, SMILE[1], IS]) == "a\ufffd\ufffd is"
    assert pieces(tokenizer, [A], [LETTER_A, SMILE[1], IS, PARIS]) == ["A", "", "is", " Paris", ""]


def test_the_engine_goes_on_from_its_prompt(sentence_model: str) -> None:
    with open_engine(sentence_model) as engine:
        for prompt, begins in (("Where is a", True), ([BOS], False)):
            answer = engine.generate(prompt, max_tokens=3, logit_bias=dict.fromkeys([PARIS, IS, A], 100.0))
            assert answer.text.startswith(" ") is begins
            assert answer.text.strip() == engine.decode(answer.token_ids)
