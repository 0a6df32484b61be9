"""What a blend takes beside the tokens that it computes: on a clock that says what each step takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cacheblend_rag import BlendConfig
from cacheblend_rag.decision import BlendCosts
from cacheblend_rag.engines import transformers_costs
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.engines.transformers_costs import measure_costs
from cacheblend_rag.engines.transformers_forward import PromptForward

from .conftest import open_engine, random_text

PASS, ROW = 5e-3, 1e-4  # seconds
RUN, TOKEN = 2e-3, 2e-5  # of a chunk


class Clock:
    """Stands still but for what steps take.

    Attributes:
        seconds: What it shows.
        of_pass: What a pass over so many rows takes.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.of_pass: Callable[[int], float] = lambda rows: PASS + ROW * rows

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def engine(make_model: Callable[..., str]) -> Iterator[TransformersEngine]:
    with open_engine(make_model("qwen2", max_position_embeddings=16384)) as engine:
        yield engine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Passes and chunks take what the constants say."""
    clock = Clock()
    recompute, watch, place = PromptForward.recompute, PromptForward.question_attention, PromptForward.place

    def timed_recompute(self: PromptForward, rows: torch.Tensor) -> torch.Tensor:
        clock.seconds += clock.of_pass(len(rows))
        return recompute(self, rows)

    def timed_watch(self: PromptForward, rows: torch.Tensor, *args: Any) -> torch.Tensor:
        clock.seconds += clock.of_pass(len(rows))
        return watch(self, rows, *args)

    def timed_place(self: PromptForward, chunk: Any, offset: int, length: int, start: int) -> None:
        clock.seconds += RUN + TOKEN * length
        place(self, chunk, offset, length, start)

    monkeypatch.setattr(PromptForward, "recompute", timed_recompute)
    monkeypatch.setattr(PromptForward, "question_attention", timed_watch)
    monkeypatch.setattr(PromptForward, "place", timed_place)
    monkeypatch.setattr(transformers_costs, "time", clock)
    return clock


def measure(engine: TransformersEngine) -> BlendCosts:
    return measure_costs(engine._loaded, engine._reader, engine.scope)


def near(costs: BlendCosts, token: float, *, reused: float = TOKEN) -> None:
    """As the clock has it, if prefill of a token takes so long."""
    assert costs.fixed == pytest.approx(PASS / token, rel=0.1)
    assert costs.choosing == pytest.approx(PASS / token, rel=0.1)  # the question's pass
    assert costs.run == pytest.approx(RUN / token, rel=0.1)
    assert costs.token == pytest.approx(reused / token, rel=0.1)


def test_what_is_fixed_and_what_chunks_take_are_told_apart(engine: TransformersEngine, clock: Clock) -> None:
    near(measure(engine), ROW + PASS / 2048)


def test_a_pass_that_is_as_quick_with_thousands_of_rows(engine: TransformersEngine, clock: Clock) -> None:
    clock.of_pass = lambda rows: max(PASS, 1e-6 * rows)
    near(measure(engine), 1e-6)


def test_chunks_read_behind_nothing(make_model: Callable[..., str], clock: Clock) -> None:
    """One that begins a prompt would be an exact prefix."""
    with open_engine(make_model("qwen2"), primer="") as engine:
        near(measure(engine), ROW + PASS / 2048)


def test_a_short_context(make_model: Callable[..., str], clock: Clock) -> None:
    """There is no room for a longer run: what tokens take counts as fixed."""
    with open_engine(make_model("qwen2", max_position_embeddings=512), primer="Notes: ") as engine:
        costs = measure(engine)
    token = ROW + PASS / 512
    assert costs.token == 0
    assert costs.fixed == pytest.approx((PASS + 256 * TOKEN) / token, rel=0.15)


def test_nothing_is_blended_where_tokens_take_long(
    engine: TransformersEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.of_pass = lambda rows: 0.1 * rows
    placed: list[Any] = []
    monkeypatch.setattr(PromptForward, "place", lambda *args: placed.append(args))
    began = clock.seconds
    assert measure(engine) == BlendCosts()
    assert not placed
    assert clock.seconds - began == pytest.approx(2 * 3.2)  # a slow model is slow the first time


@pytest.mark.parametrize("step", ["recompute", "place"])
def test_what_can_not_be_measured_costs_nothing(
    engine: TransformersEngine, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody is told of a prompt that nobody asked."""

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PromptForward, step, out_of_memory)
    with caplog.at_level(logging.INFO, "cacheblend_rag"):
        assert measure(engine) == BlendCosts()
    assert not caplog.records
    assert engine.counts["blend_fault"] == 0


def test_it_is_told() -> None:
    assert str(BlendCosts(816.6, 20, 13.4, 0.148)) == (
        "a blend takes as long as prefill of 817 tokens, 20 more to choose some, 13 for each run of a chunk and 0.15 "
        "for each token of it"
    )


def test_an_engine_measures_and_auto_prefills_what_would_take_longer(
    random_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheblend_rag.engines.transformers.measure_costs", lambda *_: BlendCosts(300, 100, 100, 0.25))
    with open_engine(random_models["qwen2"], blend=BlendConfig(min_reused_tokens=0)) as engine:
        chunks = [random_text(seed, 400) for seed in range(2)]
        engine.warm(chunks)

        def read(passages: list[str], engine: Any = engine, **blend: Any) -> tuple[str, str]:
            stats = engine.generate("\n\n".join([*passages, "What do they say?"]), max_tokens=1, blend=blend).stats
            return stats.decision, stats.reason

        decision, reason = read(chunks[:1])
        assert decision == "prefill"
        assert reason.endswith("a blend takes as long as prefill of 600")
        assert read(chunks[:1], recompute_ratio=0.0)[1].endswith("prefill of 500")  # nothing is to be chosen
        decision, reason = read(chunks)
        assert (decision, reason[:24]) == ("prefill", "blending would reuse 680")
        assert reason.endswith("a blend takes as long as prefill of 800")
        assert read([*chunks, *chunks])[0] == "blend"  # 1360 in place of 1200
        assert read(chunks[:1], mode="blend")[0] == "blend"
        beside = engine.beside(engine.library.store)
        assert read(chunks, beside) == (decision, reason)
