"""What a blend takes beside the tokens that it computes: on a clock that says what each step takes."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Stands still but for what it is told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def engine(random_models: dict[str, str]) -> Iterator[TransformersEngine]:
    with open_engine(random_models["qwen2"]) as engine:
        yield engine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Passes and chunks take what the constants say."""
    clock = Clock()
    recompute, watch, place = PromptForward.recompute, PromptForward.question_attention, PromptForward.place

    def timed_recompute(self: PromptForward, rows: torch.Tensor) -> torch.Tensor:
        clock.seconds += PASS + ROW * len(rows)
        return recompute(self, rows)

    def timed_watch(self: PromptForward, rows: torch.Tensor, *args: Any) -> torch.Tensor:
        clock.seconds += PASS + ROW * len(rows)
        return watch(self, rows, *args)

    def timed_place(self: PromptForward, chunk: Any, offset: int, length: int, start: int) -> None:
        clock.seconds += RUN + TOKEN * length
        place(self, chunk, offset, length, start)

    monkeypatch.setattr(PromptForward, "recompute", timed_recompute)
    monkeypatch.setattr(PromptForward, "question_attention", timed_watch)
    monkeypatch.setattr(PromptForward, "place", timed_place)
    monkeypatch.setattr(transformers_costs, "time", clock)
    return clock


def test_what_is_fixed_and_what_chunks_take_are_told_apart(engine: TransformersEngine, clock: Clock) -> None:
    costs = measure_costs(engine._loaded, engine._reader, engine.scope)
    token = ROW + PASS / 512  # of the longest prefill of at most a tenth of a second, and of the next
    assert costs.run == pytest.approx(RUN / token, rel=0.1)
    assert costs.token == pytest.approx(TOKEN / token, rel=0.1)
    assert costs.fixed == pytest.approx(2 * PASS / token, rel=0.2)  # the question's pass, and that of the chosen tokens


def test_nothing_is_blended_where_tokens_take_long(
    engine: TransformersEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ROW", 1e-3)
    placed: list[Any] = []
    monkeypatch.setattr(PromptForward, "place", lambda *args: placed.append(args))
    assert measure_costs(engine._loaded, engine._reader, engine.scope) == BlendCosts()
    assert not placed


def test_what_can_not_be_measured_costs_nothing(
    engine: TransformersEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PromptForward, "recompute", out_of_memory)
    assert measure_costs(engine._loaded, engine._reader, engine.scope) == BlendCosts()


def test_an_engine_measures_and_auto_prefills_what_would_take_longer(
    random_models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheblend_rag.engines.transformers.measure_costs", lambda *_: BlendCosts(400, 100, 0.25))
    with open_engine(random_models["qwen2"], blend=BlendConfig(min_reused_tokens=0)) as engine:
        chunks = [random_text(seed, 400) for seed in range(2)]
        engine.warm(chunks)

        def read(passages: list[str], engine: Any = engine, **blend: Any) -> tuple[str, str]:
            stats = engine.generate("\n\n".join([*passages, "What do they say?"]), max_tokens=1, blend=blend).stats
            return stats.decision, stats.reason

        decision, reason = read(chunks[:1])
        assert decision == "prefill"
        assert reason.endswith("a blend takes as long as prefill of 600")
        decision, reason = read(chunks)
        assert (decision, reason[:24]) == ("prefill", "blending would reuse 680")
        assert reason.endswith("a blend takes as long as prefill of 800")
        assert read([*chunks, *chunks])[0] == "blend"  # 1360 in place of 1200
        assert read(chunks[:1], mode="blend")[0] == "blend"
        beside = engine.beside(engine.library.store)
        assert read(chunks, beside) == (decision, reason)
