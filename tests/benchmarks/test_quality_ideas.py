"""Ideas that the benchmark of quality measures: that they do what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quality_ideas import POLICIES, SENSITIVITY, register
from quality_neighbours import _read_behind, best_last, neighbours, sensitivity, similarity, warm_behind_neighbours

from cacheblend_rag import load_engine
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.engines.transformers import TransformersEngine

PASSAGES = [
    "The ferry to Gannow leaves at seven in the morning. " * 4,
    "A mayor is weighed against sacks of salt. " * 5,
    "The morning ferry carries salt and letters to Gannow. " * 4,
]
PREFIX = "Read what follows.\n\n"
PROMPT = PREFIX + "\n\n".join(PASSAGES) + "\n\nQuestion: when does the ferry leave, and what does it carry?"


def test_similarity() -> None:
    alike = similarity(PASSAGES)
    assert np.allclose(alike, alike.T) and np.allclose(alike.diagonal(), 1)
    assert alike[0, 2] > alike[0, 1]
    assert neighbours(PASSAGES)[0] == PASSAGES[2]
    assert neighbours(PASSAGES[:1]) == PASSAGES[:1]
    assert best_last(PASSAGES, "When does the morning ferry to Gannow leave?")[0] == PASSAGES[1]


@pytest.fixture(scope="module")
def engine(random_models: dict[str, str]) -> TransformersEngine:
    loaded = load_engine(random_models["qwen2"], dtype="float32", device="cpu", primer="")
    assert isinstance(loaded, TransformersEngine)
    return loaded


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_ideas_choose_what_is_paid_for(engine: TransformersEngine, policy: str, ratio: float) -> None:
    register()
    engine.warm(PASSAGES)
    SENSITIVITY.update(sensitivity(engine, PASSAGES))
    stats = engine.score(PROMPT, ["seven"], blend={"mode": "blend", "policy": policy, "recompute_ratio": ratio}).stats
    matched = stats.recomputed_tokens + stats.reused_tokens
    assert (stats.decision, stats.faults) == ("blend", 0)
    assert stats.recomputed_tokens == int(round(ratio * matched, 6))


def test_a_passage_read_behind_what_stands_before_it_is_exact(engine: TransformersEngine) -> None:
    """The neighbour of the last passage is the first one: with nothing else before them, full reuse is full prefill."""
    engine.evict(PASSAGES)
    pair = [PASSAGES[0], PASSAGES[2]]
    warm_behind_neighbours(engine, pair, PREFIX)
    ids = np.concatenate([engine._prompt_ids(PREFIX), *engine._encode_chunks(pair), engine._prompt_ids("What?")])
    modes = ({"mode": "off"}, {"mode": "blend", "recompute_ratio": 0.0})
    scores = [engine.score(ids.tolist(), ["seven"], blend=mode) for mode in modes]
    assert scores[1].stats.decision == "blend"
    apart = (scores[0].logits[0] - scores[1].logits[0]).abs().max()
    assert float(apart) > 1e-4  # the first one was read behind the last
    engine.evict(pair[:1])
    engine.library.store.put(_in_place(engine, pair[0]))
    scores[1] = engine.score(ids.tolist(), ["seven"], blend=modes[1])
    torch.testing.assert_close(scores[1].logits[0], scores[0].logits[0], atol=1e-4, rtol=0)
    engine.evict(pair)


def _in_place(engine: TransformersEngine, passage: str) -> ChunkKV:
    return _read_behind(engine, engine._prompt_ids(PREFIX), engine._encode_chunks([passage])[0])
