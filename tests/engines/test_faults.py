"""I6: every fault gives exactly what the prompt gives with that chunk not warm; nothing stored is lost, nobody dies."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cacheblend_rag import Generation, PolicyError, StoreError, policies
from cacheblend_rag.budget import Budget
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines import transformers_reader
from cacheblend_rag.engines.model_files import tokenize_chunk
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.engines.transformers_forward import PromptForward
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.passes import Selection
from cacheblend_rag.store import open_store

from .conftest import open_engine, random_text

CHUNKS = [random_text(seed, 180) for seed in range(4)]
PROMPT = "Read this.\n\n" + "\n\n".join(CHUNKS[n] for n in (2, 0, 3, 1)) + "\n\nWhat does it say, in short?\n"
POLICIES = ["hkvd", "query_aware"]


@pytest.fixture(scope="module", params=["llama3-scaled", "qwen3"])
def model(request: pytest.FixtureRequest, random_models: dict[str, str]) -> str:
    directory: str = random_models.get(request.param) or request.getfixturevalue("smollm2")
    return directory


@pytest.fixture(scope="module")
def without(model: str) -> Callable[..., Generation]:
    """What the prompt gives when only some chunks are warm."""
    known: dict[tuple[int, ...], TransformersEngine] = {}

    def answer(cold: tuple[int, ...], **blend: Any) -> Generation:
        if cold not in known:
            known[cold] = open_engine(model)
            known[cold].warm([text for n, text in enumerate(CHUNKS) if n not in cold])
        return known[cold].generate(PROMPT, max_tokens=6, logprobs=4, blend=blend)

    return answer


@pytest.fixture
def engine(model: str, store_dir: Path) -> Iterator[TransformersEngine]:
    """An engine that reads every chunk from disk, all chunks warm."""
    with open_engine(model, store=open_store(store_dir, memory_bytes=0)) as engine:
        engine.warm(CHUNKS)
        yield engine


def chunk_file(engine: TransformersEngine, store_dir: Path, number: int) -> Path:
    key = engine.library.scope.key(tokenize_chunk(engine._loaded.tokenizer, CHUNKS[number]))
    return next(store_dir.rglob(f"{key}.safetensors"))


def remove(path: Path, other: Path) -> None:
    path.unlink()


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def flip_bit(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[np.random.default_rng(0).integers(len(data) // 2, len(data))] ^= 0x10
    path.write_bytes(data)


def replace_by_another(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


FAULTS = [remove, truncate, empty, flip_bit, replace_by_another]


def assert_a_miss(
    engine: TransformersEngine,
    store_dir: Path,
    without: Callable[..., Generation],
    fault: Callable[[Path, Path], None],
    policy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A chunk with this fault is as one that is not warm, and warming heals."""
    fault(chunk_file(engine, store_dir, 3), chunk_file(engine, store_dir, 0))
    with caplog.at_level(logging.WARNING, logger="cacheblend_rag"):
        broken = engine.generate(PROMPT, max_tokens=6, logprobs=4, blend={"policy": policy})
    expected = without((3,), policy=policy)
    assert broken.logprobs == expected.logprobs
    assert broken.token_ids == expected.token_ids
    assert broken.stats.faults == 1
    assert engine.counts["chunk_fault"] == 1
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    # What is left is still there, and warming heals.
    assert engine.generate(PROMPT, max_tokens=6, logprobs=4, blend={"policy": policy}).stats.faults == 0
    assert engine.warm(CHUNKS).stored == 1
    assert (
        engine.generate(PROMPT, max_tokens=6, logprobs=4, blend={"policy": policy}).logprobs
        == without((), policy=policy).logprobs
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_chunk_is_a_miss(
    engine: TransformersEngine,
    store_dir: Path,
    without: Callable[..., Generation],
    fault: Callable[[Path, Path], None],
    policy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert_a_miss(engine, store_dir, without, fault, policy, caplog)


@pytest.mark.parametrize("model", ["smollm2"], indirect=True)
def test_a_bad_chunk_of_real_weights_is_a_miss(
    engine: TransformersEngine, store_dir: Path, without: Callable[..., Generation], caplog: pytest.LogCaptureFixture
) -> None:
    assert_a_miss(engine, store_dir, without, flip_bit, "query_aware", caplog)


@pytest.mark.parametrize("fault", FAULTS)
def test_all_chunks_bad_is_plain_prefill(
    engine: TransformersEngine, store_dir: Path, fault: Callable[[Path, Path], None]
) -> None:
    plain = engine.generate(PROMPT, max_tokens=6, logprobs=4, blend={"mode": "off"})
    foreign = store_dir / "foreign"
    foreign.write_bytes(os.urandom(4096))
    for number in range(len(CHUNKS)):
        fault(chunk_file(engine, store_dir, number), foreign)
    broken = engine.generate(PROMPT, max_tokens=6, logprobs=4)
    assert broken.stats.decision == "prefill"
    assert broken.stats.faults == len(CHUNKS)
    assert broken.logprobs == plain.logprobs
    assert broken.text == plain.text


def test_a_chunk_of_another_model_is_never_read(
    engine: TransformersEngine, store_dir: Path, make_model: Callable[..., str], without: Callable[..., Generation]
) -> None:
    """The file has the right name but its header names another model."""
    other_dir = store_dir.parent / "other"
    with open_engine(make_model("qwen2", hidden_size=96), store=open_store(other_dir, memory_bytes=0)) as other:
        other.warm([CHUNKS[3]])
    foreign = next(other_dir.rglob("*.safetensors"))
    shutil.copyfile(foreign, chunk_file(engine, store_dir, 3))
    broken = engine.generate(PROMPT, max_tokens=6, logprobs=4)
    assert broken.logprobs == without((3,)).logprobs


def test_models_sharing_a_store_never_meet(model: str, make_model: Callable[..., str], store_dir: Path) -> None:
    with open_engine(model, store=open_store(store_dir)) as first:
        first.warm(CHUNKS)
        with open_engine(make_model("mistral", hidden_size=128), store=open_store(store_dir)) as second:
            assert second.generate(PROMPT, max_tokens=2).stats.decision == "prefill"
        with open_engine(model, store=open_store(store_dir), namespace="another tenant") as tenant:
            assert tenant.generate(PROMPT, max_tokens=2).stats.decision == "prefill"
        with open_engine(model, store=open_store(store_dir), primer="Another primer.") as primed:
            assert primed.generate(PROMPT, max_tokens=2).stats.decision == "prefill"
        assert first.generate(PROMPT, max_tokens=2).stats.segments == 4


@pytest.mark.parametrize("where", ["match", "load", "select", "recompute"])
def test_an_exception_in_our_code_is_plain_prefill(
    engine: TransformersEngine, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = engine.generate(PROMPT, max_tokens=6, logprobs=4, blend={"mode": "off"})

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        if where == "match":
            patch.setattr(engine.library, "match", fail)
        elif where == "load":
            patch.setattr(PromptForward, "place", fail)
        elif where == "select":
            patch.setattr(PromptForward, "question_attention", fail)
        else:
            patch.setattr(transformers_reader, "blend", fail)
        broken = engine.generate(PROMPT, max_tokens=6, logprobs=4)
    assert broken.logprobs == plain.logprobs
    assert broken.stats.decision == "prefill"
    assert broken.stats.missed_tokens == broken.stats.prompt_tokens
    assert "failed" in broken.stats.reason
    assert engine.counts["blend_fault"] == 1
    assert "on purpose" in caplog.text
    assert engine.generate(PROMPT, max_tokens=6).stats.decision == "blend"


def test_full_disk_is_one_clear_error_and_loses_nothing(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.generate(PROMPT, max_tokens=6, logprobs=4)
    extra = [random_text(seed, 100) for seed in (50, 51)]

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreError) as error:
            engine.warm(extra)
    assert "\n" not in str(error.value)
    assert "space" in str(error.value).lower()
    assert engine.generate(PROMPT, max_tokens=6, logprobs=4).logprobs == before.logprobs
    assert engine.warm(extra).stored == 2


class _Breaks:
    """A policy that returns what it was told to."""

    def __init__(self, choice: Callable[[PromptLayout, int], torch.Tensor]) -> None:
        self._choice = choice

    def select(self, layout: PromptLayout, budget: Budget, config: BlendConfig, num_layers: int) -> Selection:
        yield from ()
        return "breaks", self._choice(layout, budget.ceiling)


@pytest.mark.parametrize(
    "choice",
    [
        lambda layout, budget: layout.matched[: budget + 1],
        lambda layout, budget: layout.matched[:2].flip(0),
        lambda layout, budget: layout.matched[[0, 0]],
        lambda layout, budget: layout.missed[:1],
        lambda layout, budget: torch.tensor([layout.length]),
        lambda layout, budget: layout.matched[:1].float(),
    ],
    ids=["too many", "unsorted", "repeated", "missed", "out of range", "not integers"],
)
def test_a_policy_that_breaks_its_contract_is_named(
    engine: TransformersEngine, choice: Callable[[PromptLayout, int], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(policies._POLICIES, "breaks", _Breaks(choice))
    with pytest.raises(PolicyError, match="breaks"):
        engine.generate(PROMPT, max_tokens=1, blend={"policy": "breaks"})
