"""Blends of one step run together: what is packed, what fails alone, and that each gets its own results.

The kernels need a GPU. Here something stands in for them that takes what they take and runs it the simple way; on a
GPU, ``test_gpu.py`` has the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import policies
from cacheblend_rag.passes import Selection
from cacheblend_rag.vllm import forward
from cacheblend_rag.vllm.forward import PagedForward, PromptRows, is_scattered, run_rows
from cacheblend_rag.vllm.model import PagedModel
from cacheblend_rag.vllm.packing import MOST_PROMPTS, packs

from .conftest import Case, alone, assert_alike, connectors, random_text, together

SETTINGS: dict[str, Any] = {"max_tokens": 4, "logprobs": 2}


class StandIn:
    """Has what :class:`KernelPasses` has."""

    def __init__(self, model: PagedModel, most_rows: int) -> None:
        self.most_rows = self.most_watched = most_rows
        self.tile = 16
        self.recomputed: list[int] = []
        self.asked: list[int] = []
        self.seen: list[int] = []  # tokens of their prompts, without what is left out
        self.fails = False
        nothing = SimpleNamespace(pin=lambda chunk: False)
        self.stream = SimpleNamespace(
            holds=lambda key: False,
            pinned=nothing,
            place=lambda prompts: False,
            wait=lambda layer: None,
            wait_for_all=lambda: None,
        )
        self._model = model

    def unit(self, rows: int) -> int:
        return self.tile

    def affordable_rows(self, rows: int) -> int:
        return rows

    def takes(self, rows: torch.Tensor) -> bool:
        return is_scattered(rows)

    def takes_question(self, rows: torch.Tensor) -> bool:
        return len(rows) <= self.most_watched

    def recompute(self, prompts: Sequence[PromptRows]) -> None:
        self.recomputed.append(len(prompts))
        if self.fails:
            raise RuntimeError("injected")
        for prompt in prompts:
            positions = prompt.positions[prompt.rows]
            run_rows(self._model, prompt.token_ids[prompt.rows], prompt.rows, positions, prompt.block_ids)

    def question_attention(
        self, prompts: Sequence[PromptRows], weights: Sequence[torch.Tensor], layers: Sequence[range]
    ) -> list[torch.Tensor]:
        self.asked.append(len(prompts))
        self.seen += [len(prompt.token_ids) for prompt in prompts]
        found = []
        for prompt, counted, counting in zip(prompts, weights, layers, strict=True):
            forward = PagedForward(self._model, prompt.token_ids, prompt.block_ids.tolist(), 0)
            forward._positions = prompt.positions
            found.append(forward._question_attention(prompt.rows, counted, counting))
        return found


@pytest.fixture
def stand_in(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    scheduler, worker = (connector for connector in connectors(case.engine))
    model = worker._worker._model
    kernels = StandIn(model, 2048)
    monkeypatch.setattr(scheduler._scheduler, "_step_rows", 10**6)
    monkeypatch.setattr(model, "kernel_passes", kernels)
    yield kernels


@given(st.lists(st.integers(1, 300), max_size=60), st.sampled_from([16, 64]), st.sampled_from([320, 1024]))
def test_packs_hold_as_many_as_they_may(sizes: list[int], unit: int, most: int) -> None:
    found = packs(sizes, unit, most)
    assert [n for pack in found for n in range(pack.start, pack.stop)] == list(range(len(sizes)))
    rows = [sum(-(-size // unit) * unit for size in sizes[pack]) for pack in found]
    assert all(0 < count <= most for count in rows)
    assert all(pack.stop - pack.start <= MOST_PROMPTS for pack in found)
    for pack, following, count in zip(found, found[1:], rows, strict=False):  # the next one did not fit
        next_rows = -(-sizes[following.start] // unit) * unit
        assert count + next_rows > most or pack.stop - pack.start == MOST_PROMPTS


def test_blends_of_a_step_share_their_passes(case: Case, stand_in: StandIn) -> None:
    prompts = [case.prompt(seed) for seed in range(60, 63)]
    expected = alone(case, prompts, blend={"mode": "blend"}, **SETTINGS)
    assert (stand_in.asked, stand_in.recomputed) == ([1] * 3, [1] * 3)
    answers = together(case.engine, [(prompt, {"blend": {"mode": "blend"}, **SETTINGS}) for prompt in prompts])
    assert (stand_in.asked[3:], stand_in.recomputed[3:]) == ([3], [3])
    assert_alike(answers, expected)
    assert [answer.stats.policy for answer in answers] == ["query_aware"] * 3


def test_passes_leave_out_cold_chunks(case: Case, stand_in: StandIn) -> None:
    """Of prompts that share a pass, each its own."""
    prompts = []
    for seed, cold in ((60, 600), (61, 0), (62, 900)):
        before, question = case.prompt(seed, chunks=3).rsplit("Question", 1)
        prompts.append(f"{before}Passage 4: {random_text(seed, cold)}\n\n{case.chunks[0]}\n\nQuestion{question}")
    expected = alone(case, prompts, blend={"mode": "blend"}, **SETTINGS)
    answers = together(case.engine, [(prompt, {"blend": {"mode": "blend"}, **SETTINGS}) for prompt in prompts])
    assert stand_in.asked == [1] * 3 + [3]
    left_out = [len(case.ids(prompt)) - seen for prompt, seen in zip(prompts * 2, stand_in.seen, strict=True)]
    assert left_out[0] >= 256 and left_out[1] == 0 and left_out[2] >= 512
    assert left_out[3:] == left_out[:3]
    assert_alike(answers, expected)
    assert [answer.stats.policy for answer in answers] == ["query_aware"] * 3


@pytest.mark.parametrize("most_watched", [2048, 300])
def test_larger_blocks_are_read_whole(
    case: Case, stand_in: StandIn, most_watched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is left out, and the pass may be too long for the kernels."""
    before, question = case.prompt(61, chunks=3).rsplit("Question", 1)
    ids = case.ids(f"{before}Passage 4: {random_text(61, 700)}\n\n{case.chunks[0]}\n\nQuestion{question}")
    monkeypatch.setattr(forward, "SPAN", 100)
    stand_in.most_watched = most_watched
    stats = case.engine.generate(ids, max_tokens=1, blend={"mode": "blend"}).stats
    assert (stats.decision, stats.policy) == ("blend", "query_aware")
    assert stand_in.seen == ([len(ids)] if most_watched == 2048 else [])


def test_those_that_choose_otherwise_join_in(case: Case, stand_in: StandIn) -> None:
    """Passes that are not packed, other layers to watch, numbers that the scores decide, nothing, and everything."""
    prompts = [case.prompt(seed) for seed in range(63, 70)]
    blends: list[dict[str, Any]] = [
        {"policy": "hkvd"},
        {"policy": "query_aware"},
        {"question_layers": [0, 1]},
        {"policy": "hkvd", "recompute_ratio": "auto"},
        {"policy": "query_aware", "recompute_ratio": "auto"},
        {"recompute_ratio": 0.0},
        {"recompute_ratio": 1.0},
    ]
    expected = [alone(case, [p], blend=b, **SETTINGS)[0] for p, b in zip(prompts, blends, strict=True)]
    del stand_in.asked[:], stand_in.recomputed[:]
    answers = together(
        case.engine, [(prompt, {"blend": blend, **SETTINGS}) for prompt, blend in zip(prompts, blends, strict=True)]
    )
    assert stand_in.asked == [3]
    assert max(stand_in.recomputed) >= 2
    assert_alike(answers, expected)


@pytest.mark.parametrize("policies", [("hkvd", "query_aware"), ("query_aware", "query_aware")], ids=str)
def test_blends_do_not_read_what_the_step_blends(case: Case, stand_in: StandIn, policies: tuple[str, str]) -> None:
    """Two prompts with the same beginning, and two that are the same: the first one's blocks are for the next step."""
    beginning = "These are the rules of the house, and whoever answers keeps to them. " * 3
    prompts = [beginning + case.prompt(seed) for seed in (80, 81, 81)]
    blends = [{"policy": policy} for policy in (*policies, policies[1])]
    expected = [alone(case, [p], blend=b, **SETTINGS)[0] for p, b in zip(prompts, blends, strict=True)]
    answers = together(
        case.engine, [(prompt, {"blend": blend, **SETTINGS}) for prompt, blend in zip(prompts, blends, strict=True)]
    )
    assert_alike(answers, expected)
    assert answers[1].stats.prefix_tokens > 0  # it has read the first one's blocks


def test_one_that_fails_fails_alone(case: Case, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        reads_question = False
        adapts = False

        def cost(self, *args: object) -> float:
            return 0.0

        def select(self, *args: Any) -> Selection:
            yield from ()
            raise RuntimeError("injected")

    monkeypatch.setitem(policies._POLICIES, "broken", Broken())
    prompts = [case.prompt(seed) for seed in range(67, 70)]
    blends = [{"policy": "query_aware"}, {"policy": "broken"}, {"policy": "query_aware"}]
    expected = alone(case, prompts, blend={"policy": "query_aware"}, **SETTINGS)
    expected[1] = alone(case, [prompts[1]], blend={"mode": "off"}, **SETTINGS)[0]
    answers = together(
        case.engine, [(prompt, {"blend": blend, **SETTINGS}) for prompt, blend in zip(prompts, blends, strict=True)]
    )
    assert [answer.stats.decision for answer in answers] == ["blend", "prefill", "blend"]
    assert_alike(answers, expected)


def test_a_pass_that_fails_takes_all_in_it_along(case: Case, stand_in: StandIn) -> None:
    prompts = [case.prompt(seed) for seed in range(70, 72)]
    expected = alone(case, prompts, blend={"mode": "off"}, **SETTINGS)
    stand_in.fails = True
    answers = together(case.engine, [(prompt, SETTINGS) for prompt in prompts])
    assert [answer.stats.reason for answer in answers] == ["blending failed, see the log"] * 2
    assert_alike(answers, expected)
