"""Chat templates on the tokenizer of SmolLM2."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .families import FAMILIES, Model, open_model


@pytest.fixture(scope="session")
def tokenizer(smollm2: str) -> PreTrainedTokenizerFast:
    """The tokenizer of SmolLM2."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(smollm2)
    return tokenizer


@pytest.fixture(scope="session")
def models(tokenizer: PreTrainedTokenizerFast) -> dict[str, Model]:
    """Every family's model, by name."""
    return {name: open_model(tokenizer, name) for name in FAMILIES}
