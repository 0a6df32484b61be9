"""What an answer tells of its blend, if that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cacheblend_rag import ConfigError
from cacheblend_rag.engines.transformers_forward import PromptForward

from .conftest import Case


def top(positions: np.ndarray[Any, Any], values: np.ndarray[Any, Any], count: int) -> list[int]:
    """The positions of the highest values."""
    return sorted(positions[np.argsort(-values, kind="stable")[:count]].tolist())


@pytest.mark.parametrize(
    "blend",
    [
        {"policy": "query_aware"},
        {"policy": "hkvd"},
        {"policy": "hkvd_kv", "check_layers": (0, 1)},
        {"policy": "hybrid"},
        {"policy": "chunk_heads"},
    ],
    ids=str,
)
def test_the_choice_follows_from_what_is_told(case: Case, blend: dict[str, Any]) -> None:
    prompt = case.prompt(1)
    answer = case.engine.generate(prompt, max_tokens=3, blend=blend, logprobs=2)
    told = case.engine.generate(prompt, max_tokens=3, blend=blend, logprobs=2, trace=True)
    assert answer.trace is None
    assert (told.token_ids, told.logprobs) == (answer.token_ids, answer.logprobs)
    trace = told.trace
    assert trace is not None
    assert len(trace.recomputed) == told.stats.recomputed_tokens > 5
    matched = np.concatenate([np.arange(segment.start, segment.end) for segment in told.segments])
    assert np.isin(trace.recomputed, matched).all()
    layers = {"hkvd": [1], "hkvd_kv": [0, 1], "hybrid": [1]}.get(blend["policy"], [])
    assert sorted(trace.deviations) == layers
    assert (trace.read is not None) == (blend["policy"] in ("query_aware", "hybrid"))
    scores = np.ones(told.stats.prompt_tokens, np.float32)
    if trace.read is not None:
        assert len(trace.read.positions) == told.stats.prompt_tokens
        scores *= trace.read.values
    candidates = matched
    if layers:
        last = trace.deviations[layers[-1]]
        candidates = np.intersect1d(matched, last.positions)
        found = dict(zip(last.positions.tolist(), last.values.tolist(), strict=True))
        scores[candidates] *= np.sqrt([found[position] for position in candidates.tolist()])
    if layers or trace.read is not None:
        chosen = top(candidates, scores[candidates], len(trace.recomputed))
        assert len(set(chosen) ^ set(trace.recomputed.tolist())) <= 2  # a pair within rounding of each other


def test_what_is_told_is_what_was_measured(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[torch.Tensor] = []
    original = PromptForward.deviations

    def record(self: PromptForward, rows: torch.Tensor, layer: int, keys: bool = False) -> torch.Tensor:
        found.append(original(self, rows, layer, keys))
        return found[-1]

    monkeypatch.setattr(PromptForward, "deviations", record)
    answer = case.engine.generate(case.prompt(2), max_tokens=1, blend={"policy": "hkvd"}, trace=True)
    assert answer.trace is not None
    told = answer.trace.deviations[1]
    matched = np.concatenate([np.arange(segment.start, segment.end) for segment in answer.segments])
    assert told.positions.tolist() == matched.tolist()  # what is missed has nothing to deviate from
    assert told.values.tolist() == found[0][torch.from_numpy(matched)].tolist()


def test_nothing_is_told_where_nothing_is_blended(case: Case) -> None:
    for prompt, blend in ((case.prompt(1), {"mode": "off"}), ("Nothing of this is known. " * 9, {})):
        assert case.engine.generate(prompt, max_tokens=1, blend=blend, trace=True).trace is None
    for ratio in (0.0, 1.0):  # nothing to choose, so nothing is measured
        trace = case.engine.generate(case.prompt(1), max_tokens=1, blend={"recompute_ratio": ratio}, trace=True).trace
        assert trace is not None
        assert (trace.deviations, trace.read) == ({}, None)
    with pytest.raises(ConfigError, match="trace must be True or False"):
        case.engine.generate("x", trace="yes")


def test_deviations_are_what_the_check_layers_measure(case: Case) -> None:
    """Behind a check layer stands exact KV, so that there both have to be the same."""
    prompt = case.prompt(4)
    found = case.engine.deviations(prompt)
    layers = case.engine.num_layers
    assert found.keys.shape == found.values.shape == (layers, len(found.positions))
    assert np.isfinite(found.keys).all() and np.isfinite(found.values).all()  # whatever is poisoned is left out
    assert found.values[0].max() < 1e-6 < found.values[1].max()  # nothing comes before the first layer
    for policy, layer in (("hkvd", 1), ("hkvd_kv", 1), ("hkvd", layers - 1)):
        blend = {"policy": policy, "check_layers": (layer,)}
        trace = case.engine.generate(prompt, max_tokens=1, blend=blend, trace=True).trace
        assert trace is not None
        measured = trace.deviations[layer]
        assert measured.positions.tolist() == found.positions.tolist()
        expected = found.values[layer] + (found.keys[layer] if policy == "hkvd_kv" else 0)
        assert np.allclose(measured.values, expected, rtol=1e-3, atol=1e-4 * expected.max())
    cold = case.engine.deviations("Nothing of this is known.")
    assert cold.values.shape == (layers, 0)
