"""A guard on the embedded engine: what it measures of real answers, and what it does about chunks that are wrong."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry

import cacheblend_rag
from cacheblend_rag import ConfigError
from cacheblend_rag.diagnostics.prometheus import PrometheusMetrics
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.guard import TURNED_OFF, Guard
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.store import MemoryStore

from .conftest import BLEND, Case, open_engine, random_text

CHUNKS = [random_text(seed, 150) for seed in range(6)]
OFF = {"mode": "off"}


@pytest.fixture(scope="module")
def engine(random_models: dict[str, str]) -> Iterator[TransformersEngine]:
    with open_engine(random_models["llama3-scaled"]) as engine:
        yield engine


@pytest.fixture
def watched(engine: TransformersEngine) -> Iterator[TransformersEngine]:
    with engine.beside(MemoryStore(1 << 28)) as watched:
        watched.warm(CHUNKS)
        watched.watch(1.0)
        yield watched


def guard_of(engine: TransformersEngine) -> Guard:
    assert engine.guard is not None
    return engine.guard


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def prompt(seed: int) -> str:
    return Case.prompt(Case(None, None, CHUNKS), seed)  # type: ignore[arg-type]


def ask(engine: TransformersEngine, count: int, **blend: Any) -> list[BlendStats]:
    """Prompts, each of them compared before the next."""
    stats = []
    for seed in range(count):
        report = guard_of(engine).report()
        stats.append(engine.generate(prompt(seed), max_tokens=4, blend=blend).stats)
        if stats[-1].decision == "blend":
            until(lambda report=report: guard_of(engine).report().compared > report.compared)  # type: ignore[misc]
    return stats


def test_it_measures_what_is_measured_by_hand(watched: TransformersEngine) -> None:
    seen: list[BlendStats] = []
    watched.add_observer(seen.append)
    expected = []
    for seed in range(5):
        answer = watched.generate(prompt(seed), max_tokens=6)
        until(lambda seed=seed: guard_of(watched).report().compared == seed + 1)  # type: ignore[misc]
        full, blended = (
            watched.score(prompt(seed), [answer.token_ids], blend=blend).logits[0].double().log_softmax(-1)
            for blend in (OFF, {})
        )
        expected.append(float(torch.nn.functional.kl_div(blended, full, log_target=True, reduction="sum")) / 6)
    assert min(expected) > 1e-6
    assert guard_of(watched).report().mean_kl == pytest.approx(sum(expected) / 5, rel=1e-3)
    assert len(seen) == 5  # what the guard asks is not among the answers
    list(watched.stream(prompt(5), max_tokens=3))
    until(lambda: guard_of(watched).report().compared == 6)
    watched.generate(prompt(6), max_tokens=1, blend=OFF)
    assert guard_of(watched).report().compared + len(guard_of(watched)._waiting.queue) == 6


def test_answers_are_as_without_it(watched: TransformersEngine) -> None:
    guarded = watched.generate(prompt(1), max_tokens=8, logprobs=3)
    guard_of(watched).close()
    watched.guard = None
    alone = watched.generate(prompt(1), max_tokens=8, logprobs=3)
    assert (guarded.token_ids, guarded.logprobs) == (alone.token_ids, alone.logprobs)


def test_blends_of_wrong_chunks_end(watched: TransformersEngine) -> None:
    """Values of other chunks: answers make no sense, and nothing else would notice."""
    for key in watched.stored_keys():
        chunk = watched.library.store.get(key)
        assert chunk is not None
        generator = torch.Generator().manual_seed(0)
        wrong = dataclasses.replace(chunk, kv=30 * torch.randn(chunk.kv.shape, generator=generator))
        watched.library.store.put(wrong)
    stats = ask(watched, 40)
    blended = [one for one in stats if one.decision == "blend"]
    ratios = [round(one.recomputed_tokens / (one.recomputed_tokens + one.reused_tokens), 2) for one in blended]
    assert list(dict.fromkeys(ratios)) == sorted(set(ratios)) == [0.15, 0.25, 0.5]
    assert 24 <= len(blended) < 40
    for one in stats[len(blended) :]:
        assert (one.decision, one.reason) == ("prefill", TURNED_OFF)
    assert guard_of(watched).report().least_ratio == 1
    answers = [watched.generate(prompt(40), max_tokens=6, blend=blend).token_ids for blend in ({}, OFF)]
    assert answers[0] == answers[1]
    guard_of(watched).reset()
    assert watched.generate(prompt(41), max_tokens=1).stats.decision == "blend"


def test_answers_that_are_near_are_left_alone(watched: TransformersEngine) -> None:
    stats = ask(watched, 12, recompute_ratio=0.9)  # a random model's answers are far at less
    assert {one.decision for one in stats} == {"blend"}
    assert guard_of(watched).report().least_ratio == 0


def test_an_engine_beside_has_none(watched: TransformersEngine) -> None:
    with watched.beside(MemoryStore(1 << 28)) as other:
        assert other.guard is None


def test_a_guard_comes_with_the_engine(random_models: dict[str, str]) -> None:
    directory = random_models["llama3-scaled"]
    with cacheblend_rag.load_engine(directory, dtype="float32", device="cpu", guard=1.0, blend=BLEND) as engine:
        assert isinstance(engine, TransformersEngine)
        engine.warm(CHUNKS)
        ask(engine, 1)
        thread = guard_of(engine)._thread
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
    with pytest.raises(ConfigError, match="guard must be a share"):
        cacheblend_rag.load_engine("no such model", guard=2.0)


def test_what_prometheus_is_told(watched: TransformersEngine) -> None:
    registry = CollectorRegistry()
    PrometheusMetrics(watched, registry)
    labels = {"model": watched.model_name, "namespace": "test"}
    assert registry.get_sample_value("cacheblend_guard_least_ratio", labels) == 0
    assert registry.get_sample_value("cacheblend_guard_mean_kl_nats", labels) is None
    ask(watched, 2)
    report = guard_of(watched).report()
    assert registry.get_sample_value("cacheblend_guard_answers_total", labels | {"outcome": "compared"}) == 2
    assert registry.get_sample_value("cacheblend_guard_answers_total", labels | {"outcome": "failed"}) == 0
    assert registry.get_sample_value("cacheblend_guard_mean_kl_nats", labels) == report.mean_kl
    watched.guard = None
    assert registry.get_sample_value("cacheblend_guard_least_ratio", labels) is None
