"""Metrics of answers, on values worked out by hand."""

from __future__ import annotations

import pytest
from answer_metrics import answer_metrics, exact_match, f1, rouge_l


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1),
        ("an  apple", "Apple", 1),
        ("another", "other", 0),  # articles are words, not beginnings of words
        ("in 1974", "1974", 0),
        ("1,974", "1974", 1),
        ("", "x", 0),
    ],
)
def test_exact_match(answer: str, gold: str, expected: float) -> None:
    assert exact_match(answer, gold) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Charles County, Maryland", "Charles County", 2 * 2 / 5),
        ("no no no", "no no", 2 * 2 / 5),
        ("the cat the cat", "a cat", 2 * 1 / 3),  # a word counts as often as both have it
        ("yes", "yes", 1),
        ("yes, it is", "yes", 0),
        ("dog", "cat", 0),
        ("", "cat", 0),
        ("the", "an", 1),
    ],
)
def test_f1(answer: str, gold: str, expected: float) -> None:
    assert f1(answer, gold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        # The examples of Lin (2004): subsequences of three and of two of four words.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("a b c d e", "a c e", 2 * 3 / 8),
        ("c b a", "a b c", 1 / 3),
        ("Net-maker", "net maker", 1),
        ("", "cat", 0),
    ],
)
def test_rouge_l(answer: str, gold: str, expected: float) -> None:
    assert rouge_l(answer, gold) == pytest.approx(expected)


def test_the_best_gold_answer_counts() -> None:
    assert answer_metrics("New York", ["Boston", "new york"]) == {"em": 1, "f1": 1, "rouge_l": 1}
    metrics = answer_metrics("New York City", ["New Orleans", "York City of England"])
    assert metrics == pytest.approx({"em": 0, "f1": 2 * 2 / 7, "rouge_l": 2 * 2 / 7})
