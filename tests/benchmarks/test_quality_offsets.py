"""What chunks have wrong on average."""

from __future__ import annotations

import pytest
from quality_offsets import add_offsets, find_offsets

from cacheblend_rag import load_engine
from cacheblend_rag.engines.transformers import TransformersEngine

PASSAGES = ["The ferry leaves at seven in the morning. " * 4, "A mayor is weighed against sacks of salt. " * 5]
PROMPT = "Read what follows.\n\n" + "\n\n".join(PASSAGES) + "\n\nQuestion: when does the ferry leave?"


@pytest.mark.parametrize("name", ["llama3-scaled", "qwen2"])
def test_with_offsets_of_the_very_prompt_no_error_is_left_on_average(name: str, random_models: dict[str, str]) -> None:
    with load_engine(random_models[name], dtype="float32", device="cpu", primer="") as engine:
        assert isinstance(engine, TransformersEngine)
        offsets = find_offsets(engine, [(PROMPT, PASSAGES)])
        assert engine.is_warm(PASSAGES) == [False, False]
        assert offsets.abs().amax(dim=(2, 3)).min() == 0  # the first layer's values depend on nothing before them
        assert offsets[1:].abs().max() > 1e-3
        engine.warm(PASSAGES)
        add_offsets(engine, PASSAGES, offsets)
        left = find_offsets(engine, [(PROMPT, PASSAGES)])  # of what is warm already
        assert float(left.abs().max()) < 1e-4
