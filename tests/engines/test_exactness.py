"""The doctor's figures: rounding on every architecture, and large where something is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cacheblend_rag.engines import transformers_forward, transformers_reader
from cacheblend_rag.engines.transformers_exactness import Exactness
from cacheblend_rag.engines.transformers_forward import PromptForward

from .conftest import Case, open_engine, random_text


def measured(case: Case) -> Exactness:
    counts, keys = dict(case.engine.counts), case.engine.stored_keys()
    # Real weights take a hundred times as long.
    prompt = f"Read this.\n{case.chunks[0]}\nWhat comes next, and why?" if case.real else case.prompt(5)
    found = case.engine.measure_exactness(prompt, [text for text in case.chunks if text[30:60] in prompt])
    assert case.engine.stored_keys() == keys  # the engine's store is left alone
    assert dict(case.engine.counts) == counts
    return found


def test_what_is_exact_differs_by_rounding(case: Case) -> None:
    found = measured(case)
    assert found.everything <= 1e-4
    assert list(found.exact_kv) == [0.0, 0.15]
    assert max(found.exact_kv.values()) <= max(1e-4, 2 * found.rounding)
    assert found.shift.shape == (case.engine.num_layers,)
    assert found.shift.max() < 1e-3


@pytest.fixture(scope="module")
def small(random_models: dict[str, str]) -> Iterator[Case]:
    """One random model: what is wrong shows in any."""
    with open_engine(random_models["qwen3"]) as engine:
        yield Case(engine, reference=None, chunks=[random_text(seed, 130) for seed in range(4)])  # type: ignore[arg-type]


def test_keys_moved_to_the_wrong_place_are_seen(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PromptForward._rotary

    def beside(self: PromptForward, start: int, length: int) -> object:
        return original(self, start + (start > 0), length)

    monkeypatch.setattr(PromptForward, "_rotary", beside)
    assert measured(small).shift.max() > 1e-3


def test_a_mask_that_hides_a_key_is_seen(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(transformers_forward.RowAttention):
        """Of rows with gaps between them, none sees the first key."""

        def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
            if not self._whole:
                value = value.clone()
                value[:, :, 0] = 0
            return super().__call__(query, key, value, scale)

    monkeypatch.setattr(transformers_forward, "RowAttention", Blind)
    found = measured(small)
    assert min(found.exact_kv.values()) > 1e-3


def test_a_prompt_that_is_not_blended_is_no_success(small: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_reader, "blend", None)  # fails, and the prompt is prefilled
    found = measured(small)
    assert np.isnan([found.everything, *found.exact_kv.values()]).all()
