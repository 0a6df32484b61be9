"""The doctor's figures: rounding on every architecture, and large where something is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cacheblend_rag.engines import transformers_forward, transformers_reader
from cacheblend_rag.engines.transformers_exactness import Exactness
from cacheblend_rag.engines.transformers_forward import PromptForward

from .conftest import Case


def measured(case: Case) -> Exactness:
    counts, keys = dict(case.engine.counts), case.engine.stored_keys()
    found = case.engine.measure_exactness(case.prompt(5), case.chunks)
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


@pytest.fixture
def small(case: Case) -> Case:
    """A random model: what is wrong shows in any."""
    if case.real:
        pytest.skip("takes long, and shows nothing more")
    return case


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
