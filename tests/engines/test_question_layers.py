"""In which layers the question counts: as a call says, the settings, or the model's profile; else in the last half."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag import BlendConfig
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.engines.transformers_forward import PromptForward
from cacheblend_rag.model_profile import ModelProfile, profile_path, write_profile
from cacheblend_rag.store import open_store

from . import conftest
from .conftest import random_text

CHUNKS = [random_text(seed, 160) for seed in range(4)]
PROMPT = "\n".join([*CHUNKS, "Question: what comes next, and why?"])
LAST_HALF, PROFILED = (2, 4), (1, 3)


def open_engine(model: str, **changes: Any) -> TransformersEngine:
    """With a short primer, to save time."""
    return conftest.open_engine(model, **{"primer": "A passage.\n", **changes})


@pytest.fixture(scope="module")
def model(make_model: Callable[..., str]) -> str:
    return make_model("llama", model_type="llama")


@pytest.fixture(scope="module")
def store(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with warm chunks and a profile."""
    directory = tmp_path_factory.mktemp("profiled") / "store"
    with open_engine(model, store=open_store(directory)) as engine:
        engine.warm(CHUNKS)
        weights = engine.scope.fingerprint.weights
    with contextlib.closing(open_store(directory)) as opened:
        write_profile(opened, ModelProfile(model, weights, 4, PROFILED, {}))
    return directory


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The layers of every pass that watches the question."""
    found: list[tuple[int, int]] = []
    watch = PromptForward.question_attention

    def record(self: PromptForward, rows: Any, weights: Any, layers: range, unread: Any) -> Any:
        found.append((layers.start, layers.stop))
        return watch(self, rows, weights, layers, unread)

    monkeypatch.setattr(PromptForward, "question_attention", record)
    return found


@pytest.fixture
def engine(model: str, store: Path) -> Iterator[TransformersEngine]:
    with open_engine(model, store=open_store(store)) as engine:
        yield engine


def test_the_profile_is_the_default(engine: TransformersEngine, watched: list[tuple[int, int]]) -> None:
    assert engine.blend.question_layers == PROFILED
    for blend, layers in (
        (None, PROFILED),
        ({"recompute_ratio": 0.3}, PROFILED),
        ({"policy": "hybrid"}, PROFILED),
        ({"question_layers": None}, PROFILED),
        (BlendConfig(mode="blend"), PROFILED),
        ({"question_layers": [0, 1]}, (0, 1)),
        (BlendConfig(mode="blend", question_layers=(0, 4)), (0, 4)),
    ):
        watched.clear()
        engine.generate(PROMPT, max_tokens=1, blend=blend)
        assert watched == [layers]


def test_what_the_user_says_wins(model: str, store: Path, watched: list[tuple[int, int]]) -> None:
    given = BlendConfig(mode="blend", question_layers=(0, 2))
    with open_engine(model, store=open_store(store), blend=given) as engine:
        assert engine.blend == given
        engine.generate(PROMPT, max_tokens=1)
    assert watched == [(0, 2)]


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"codec": "fp8"}, {"primer": "x"}, {"namespace": "other"}])
def test_a_profile_is_the_models(model: str, store: Path, changes: dict[str, Any]) -> None:
    with open_engine(model, store=open_store(store), **changes) as engine:
        assert engine.blend.question_layers == PROFILED


def test_without_a_profile_the_last_half_counts(model: str, watched: list[tuple[int, int]]) -> None:
    with open_engine(model) as engine:
        engine.warm(CHUNKS)
        engine.generate(PROMPT, max_tokens=1)
        assert engine.blend.question_layers is None
    assert watched == [LAST_HALF]


def test_a_damaged_profile_is_told_and_ignored(
    engine: TransformersEngine, model: str, tmp_path: Path, watched: list[tuple[int, int]], caplog: Any
) -> None:
    with contextlib.closing(open_store(tmp_path / "store")) as opened:
        path = profile_path(opened, engine.scope.fingerprint.weights)
        assert path is not None
        path.parent.mkdir()
        path.write_text("{")
    with open_engine(model, store=open_store(tmp_path / "store")) as other:
        other.warm(CHUNKS)
        other.generate(PROMPT, max_tokens=1)
    assert watched == [LAST_HALF]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_other_layers_choose_other_tokens(engine: TransformersEngine) -> None:
    def scores(**blend: Any) -> Any:
        return engine.score(PROMPT, ["a"], blend=blend).logits[0]

    default, early = scores(), scores(question_layers=(0, 1))
    assert float((default - scores(question_layers=PROFILED)).abs().max()) == 0
    assert float((default - early).abs().max()) > 1e-3
    # With everything recomputed, nothing is left to choose.
    assert float((scores(recompute_ratio=1.0, question_layers=(0, 1)) - scores(mode="off")).abs().max()) < 1e-4
