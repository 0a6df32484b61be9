"""Where a model's profile comes from: the questions, the ranges compared, and when one is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.errors import CacheBlendError, ConfigError
from cacheblend_rag.loading import load_engine
from cacheblend_rag.profiling import Measurement, candidate_ranges, choose, last_half, make_profile, measure, too_few
from cacheblend_rag.profiling_data import PASSAGES, passages_of, read_questions

HALF, OTHER, THIRD = (6, 12), (4, 9), (8, 12)


def test_the_questions_that_ship() -> None:
    questions = read_questions()
    texts = {text for one in questions for text in one.passages}
    assert len(questions) == 16 and len(texts) == 24
    assert sum(len(one.passages) > 1 for one in questions) == 9
    for number, one in enumerate(questions):
        assert any(one.answer.removeprefix("the ") in text for text in one.passages), one.text
        passages = passages_of(questions, number)
        assert len(passages) == len(set(passages)) == PASSAGES
        assert set(one.passages) <= set(passages) <= texts
        assert passages == passages_of(questions, number)


def test_passages_that_are_too_many_all_stay(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    record = {"question": "Why?", "answer": "So.", "passages": [f"Passage {n}." for n in range(10)]}
    path.write_text(json.dumps(record) + "\n\n" + json.dumps({**record, "passages": ["Another."]}))
    questions = read_questions(path)
    assert sorted(passages_of(questions, 0)) == sorted(record["passages"])
    assert len(passages_of(questions, 1)) == PASSAGES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "[]",
        "{",
        "\xff",
        json.dumps({"question": "Why?", "answer": "So."}),
        json.dumps({"question": "Why?", "answer": "So.", "passages": []}),
        json.dumps({"question": "Why?", "answer": " ", "passages": ["a"]}),
        json.dumps({"question": "Why?", "answer": "So.", "passages": "a"}),
        json.dumps({"question": "Why?", "answer": "So.", "passages": [1]}),
    ],
    ids=str,
)
def test_bad_questions(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as error:
        read_questions(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@given(st.integers(1, 200))
def test_ranges_are_within_the_model(num_layers: int) -> None:
    ranges = candidate_ranges(num_layers)
    assert ranges[0] == last_half(num_layers) == (num_layers // 2, num_layers)
    assert len(set(ranges)) == len(ranges)
    assert all(0 <= first < end <= num_layers for first, end in ranges)
    assert len(ranges) >= 10 or num_layers < 12  # some coincide


def test_a_range_is_chosen_if_it_is_better_beyond_chance() -> None:
    half = [1.0] * 16
    assert choose({HALF: half, OTHER: [0.9] * 16}, HALF) == OTHER
    assert choose({HALF: half, OTHER: [0.9] * 16, THIRD: [0.8] * 16}, HALF) == THIRD
    assert choose({HALF: half, OTHER: [0.9] * 9 + [1.1] * 7}, HALF) == HALF  # as chance has it
    assert choose({HALF: half, OTHER: [0.99] * 15 + [5.0]}, HALF) == HALF  # worse in the sum
    assert choose({HALF: [*half[1:], 90.0], OTHER: [*[1.1] * 15, 1.0]}, HALF) == HALF  # better by an outlier
    assert choose({HALF: half[:2], OTHER: [0.1, 0.1]}, HALF) == HALF  # too few to know
    assert too_few(2, 2) and not too_few(16, 12)
    for questions in range(1, 12):  # all of them are better
        told = choose({HALF: [1.0] * questions, OTHER: [0.5] * questions, THIRD: [0.9] * questions}, HALF) == OTHER
        assert told is not too_few(questions, 3)


@given(st.lists(st.tuples(*[st.floats(0, 10)] * 3), min_size=1, max_size=30))
def test_what_is_chosen_is_no_worse(rows: list[tuple[float, ...]]) -> None:
    half, other, third = (list(column) for column in zip(*rows, strict=True))
    kl = {HALF: half, OTHER: other, THIRD: third}
    chosen = choose(kl, HALF)
    assert sum(kl[chosen]) <= sum(half)
    assert choose({HALF: half, OTHER: list(half)}, HALF) == HALF


@pytest.fixture(scope="module")
def engine(make_model: Callable[..., str]) -> TransformersEngine:
    """A small random model without a chat template. Its tokens are bytes."""
    loaded = load_engine(make_model("llama", model_type="llama", num_hidden_layers=6), primer="", dtype="float32")
    assert isinstance(loaded, TransformersEngine)
    return loaded


def test_measuring(engine: TransformersEngine, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    record = {"question": "What is it about?", "answer": "This.", "passages": ["It is about this and that. " * 3]}
    long = {**record, "passages": ["long " * 1000]}
    path.write_text("\n".join(map(json.dumps, [record, long, {**record, "passages": ["It rains on the hill. " * 4]}])))
    questions = read_questions(path)
    told: list[tuple[int, int]] = []
    found = measure(engine, [questions[0], questions[2]], ratio=0.2, progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)] and found.left_out == []
    assert list(found.kl) == candidate_ranges(6)
    assert all(len(kl) == 2 and min(kl) >= 0 for kl in [found.full_reuse, *found.kl.values()])
    assert len({tuple(kl) for kl in found.kl.values()}) > 1  # each range has a choice of its own
    limited = measure(engine, [questions[0], questions[2]], limit=1, ratio=0.2, progress=lambda *at: None)
    assert limited.full_reuse == found.full_reuse[:1]
    with pytest.raises(CacheBlendError, match="no question could be measured: question 1: chunk"):
        measure(engine, questions[1:2], ratio=0.2, progress=lambda *at: None)


def test_what_a_profile_says(engine: TransformersEngine) -> None:
    ranges = candidate_ranges(6)
    better = ranges[1]
    kl = {layers: [0.5 if layers == better else 1.0] * 16 for layers in ranges}
    made = make_profile(engine, Measurement([2.0] * 16, kl, ["question 9: too long"]), ratio=0.2)
    assert (made.weights, made.num_layers) == (engine.scope.fingerprint.weights, 6)
    assert made.question_layers == better
    assert (made.measured["questions"], made.measured["recompute_ratio"]) == (16, 0.2)
    assert made.measured["left_out"] == ["question 9: too long"]
    first, second = made.measured["candidates"][:2]
    assert first == {"layers": [3, 6], "kl": 16.0, "median_kl": 1.0, "closure": 0.5, "wins": 0, "losses": 0}
    assert second == {"layers": list(better), "kl": 8.0, "median_kl": 0.5, "closure": 0.75, "wins": 16, "losses": 0}
    json.dumps(made.to_dict(), allow_nan=False)
