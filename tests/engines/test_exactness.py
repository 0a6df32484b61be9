"""The doctor's figures: rounding on every architecture, and large where something is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cacheblend_rag.engines import transformers_forward, transformers_reader
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.engines.transformers_exactness import Exactness
from cacheblend_rag.engines.transformers_forward import PromptForward

from ..conftest import ARCHITECTURES
from .conftest import open_engine, random_text

CHUNKS = [random_text(seed, 80) for seed in range(2)]


@pytest.fixture(scope="module", params=["smollm2", *ARCHITECTURES])
def engine(request: pytest.FixtureRequest, random_models: dict[str, str]) -> Iterator[TransformersEngine]:
    """Every model in turn, nothing warm, behind a short primer: real weights take long."""
    directory = random_models.get(request.param) or request.getfixturevalue("smollm2")
    with open_engine(directory, primer="Some passages follow, and a question after them.\n\n") as engine:
        yield engine


@pytest.fixture(scope="module")
def small(random_models: dict[str, str]) -> Iterator[TransformersEngine]:
    """One random model: what is wrong shows in any."""
    with open_engine(random_models["qwen3"]) as engine:
        yield engine


def measured(engine: TransformersEngine) -> Exactness:
    prompt = f"Read these.\n{CHUNKS[1]}\n\nAnd this, without its head:\n{CHUNKS[0][15:]}\n\nWhat comes next, and why?"
    found = engine.measure_exactness(prompt, CHUNKS)
    assert not engine.stored_keys()  # the engine's store is left alone
    assert not engine.counts.total()
    return found


def test_what_is_exact_differs_by_rounding(engine: TransformersEngine) -> None:
    found = measured(engine)
    assert found.everything <= 1e-4
    assert list(found.exact_kv) == [0.0, 0.15]
    assert max(found.exact_kv.values()) <= max(1e-4, 2 * found.rounding)
    assert found.shift.shape == (engine.num_layers,)
    assert found.shift.max() < 1e-3


def test_keys_moved_to_the_wrong_place_are_seen(small: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PromptForward._rotary

    def beside(self: PromptForward, start: int, length: int) -> object:
        return original(self, start + (start > 0), length)

    monkeypatch.setattr(PromptForward, "_rotary", beside)
    assert measured(small).shift.max() > 1e-3


def test_a_mask_that_hides_a_key_is_seen(small: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_prompt_that_is_not_blended_is_no_success(small: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_reader, "blend", None)  # fails, and the prompt is prefilled
    found = measured(small)
    assert np.isnan([found.everything, *found.exact_kv.values()]).all()
