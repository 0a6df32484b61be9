"""The policies choose on vLLM what they choose in the embedded engine. Both find the same profile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cacheblend_rag.engines.fingerprint import _digest_weights
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.model_profile import ModelProfile, write_profile
from cacheblend_rag.store import open_store
from cacheblend_rag.trace import BlendTrace
from cacheblend_rag.vllm.forward import PagedForward

from .conftest import BLEND, CHUNKS, MOE, PRIMER, WIDE, Case, Engines, forget_prefixes, random_text

PROFILED = (1, 3)  # neither end is that of the last half


@pytest.fixture(scope="module", params=["llama3-scaled", "qwen3", "moe"])
def directory(request: pytest.FixtureRequest, make_model: Callable[..., str]) -> str:
    return make_model(request.param, **WIDE, **(MOE if request.param == "moe" else {}))


@pytest.fixture(scope="module")
def store(directory: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory_of_store = tmp_path_factory.mktemp("shared") / "store"
    weights = _digest_weights(Path(directory))
    with contextlib.closing(open_store(directory_of_store)) as opened:
        write_profile(opened, ModelProfile(directory, weights, 4, PROFILED, {}))
    return directory_of_store


@pytest.fixture(scope="module")
def embedded(directory: str, store: Path) -> Iterator[TransformersEngine]:
    """Warms the store that vLLM reads."""
    engine = TransformersEngine(
        directory,
        store=open_store(store),
        blend=BLEND,
        dtype="float32",
        device="cpu",
        primer=PRIMER,
        namespace="test",
        codec="raw",
        chat_template=None,
        engine_args={},
    )
    engine.warm(CHUNKS)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "blend",
    [
        {"policy": "hkvd"},
        {"policy": "hkvd", "check_layers": (0, 2)},
        {"policy": "hkvd_kv", "check_layers": (1, 2)},
        {"policy": "hybrid", "forced_tokens": 3},
        {"question_layers": (2, 4)},
        {},
        {"recompute_ratio": "auto", "ratio_range": (0.1, 0.9)},
        {"recompute_ratio": "auto", "policy": "hkvd", "check_layers": (0, 2), "ratio_range": (0.1, 0.9)},
    ],
    ids=str,
)
@pytest.mark.parametrize("begins_with_primer", [False, True])
def test_both_engines_choose_alike(
    engines: Engines,
    directory: str,
    store: Path,
    embedded: TransformersEngine,
    choices: list[torch.Tensor],
    blend: dict[str, Any],
    begins_with_primer: bool,
) -> None:
    engine = engines.get(directory, store)
    assert engine.scope == embedded.scope
    assert engine.blend.question_layers == embedded.blend.question_layers == PROFILED
    assert engine.warm(CHUNKS).already_there == len(CHUNKS)  # one store, one fingerprint
    forget_prefixes(engine)
    for seed in range(3):
        prompt = Case(engine, CHUNKS).prompt(seed)
        if begins_with_primer:  # then the first passage is exact in both
            prompt = PRIMER + CHUNKS[seed] + prompt
        call = {"max_tokens": 4, "blend": {"recompute_ratio": 0.2, **blend}, "logprobs": 3, "trace": True}
        theirs = embedded.generate(prompt, **call)
        mine = engine.generate(prompt, **call)
        expected, chosen = (set(positions.tolist()) for positions in choices[-2:])
        assert len(chosen) == len(expected) > 80
        assert len(chosen ^ expected) <= 2  # a pair of tokens within rounding of each other
        assert (mine.stats.reused_tokens, mine.stats.recomputed_tokens) == (
            theirs.stats.reused_tokens,
            theirs.stats.recomputed_tokens,
        )
        if chosen == expected:
            assert mine.token_ids == theirs.token_ids
            assert_told_alike(mine.trace, theirs.trace)


def assert_told_alike(mine: BlendTrace | None, theirs: BlendTrace | None) -> None:
    assert mine is not None
    assert theirs is not None
    assert mine.recomputed.tolist() == theirs.recomputed.tolist()
    assert list(mine.deviations) == list(theirs.deviations)
    assert (mine.read is None) == (theirs.read is None)
    pairs = [(mine.deviations[layer], theirs.deviations[layer]) for layer in mine.deviations]
    if mine.read is not None and theirs.read is not None:
        pairs.append((mine.read, theirs.read))
    for one, other in pairs:
        assert one.positions.tolist() == other.positions.tolist()
        assert np.allclose(one.values, other.values, rtol=1e-3, atol=1e-5)
    assert pairs[-1][1].values.max() > 1e-3  # those of layer 0 are all 0: nothing came before it


@pytest.mark.parametrize("policy", ["query_aware", "hybrid"])
def test_both_engines_leave_out_cold_chunks(
    engines: Engines,
    directory: str,
    store: Path,
    embedded: TransformersEngine,
    choices: list[torch.Tensor],
    policy: str,
) -> None:
    """What the question's pass leaves out is poisoned in both."""
    engine = engines.get(directory, store)
    engine.warm(CHUNKS)
    left_out: list[int] = []
    question_pass = PagedForward.question_attention

    def record(self: PagedForward, rows: torch.Tensor, *args: Any) -> torch.Tensor:
        left_out.append(len(args[-1]))
        return question_pass(self, rows, *args)

    blend = {"policy": policy, "recompute_ratio": 0.2}
    for seed in range(3):
        before, question = Case(engine, CHUNKS).prompt(seed, chunks=3).rsplit("Question", 1)
        cold = random_text(100 + seed, 500)
        prompt = f"{before}Passage 4: {cold}\n\nPassage 5: {CHUNKS[seed]}\n\nQuestion{question}"
        forget_prefixes(engine)
        theirs = embedded.generate(prompt, max_tokens=4, blend=blend, logprobs=3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PagedForward, "question_attention", record)
            mine = engine.generate(prompt, max_tokens=4, blend=blend, logprobs=3)
        expected, chosen = (set(positions.tolist()) for positions in choices[-2:])
        assert len(chosen) == len(expected) > 80
        assert len(chosen ^ expected) <= 2
        assert mine.stats.missed_tokens == theirs.stats.missed_tokens > 400
        if chosen == expected:
            assert mine.token_ids == theirs.token_ids
    assert all(count >= 256 and count % 128 == 0 for count in left_out)
    assert len(left_out) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"logit_bias": {7: 3.0, 9: -100.0}, "min_tokens": 6},
    ],
    ids=str,
)
def test_both_engines_penalise_alike(
    engines: Engines, directory: str, store: Path, embedded: TransformersEngine, settings: dict[str, Any]
) -> None:
    engine = engines.get(directory, store)
    for seed in range(3):
        prompt = Case(engine, CHUNKS).prompt(seed)
        arguments = {"max_tokens": 8, "blend": {"mode": "off"}, **settings}
        assert engine.generate(prompt, **arguments).token_ids == embedded.generate(prompt, **arguments).token_ids
