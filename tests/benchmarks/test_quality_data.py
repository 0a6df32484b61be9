"""Questions out of files of each form, and out of the example corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quality_data import Question, read_corpus, read_questions

MUSIQUE = [
    {
        "ctxs": [{"title": "", "text": "one"}, {"title": "Two", "text": "2"}],
        "question": "How many?",
        "answers": ["2", "two"],
    },
    {"ctxs": [{"title": "", "text": "blue"}], "question": "What colour?", "answers": ["blue"]},
]
HOTPOT = [
    {
        "question": "Who\u2028sings?",  # some count it as the end of a line
        "answer": "Rush",
        "context": [["Rush", ["A band.", " They sing."]], ["Geddy Lee", ["A bassist."]]],
        "supporting_facts": [["Rush", 1]],
    }
]


def test_a_list_of_records_with_ctxs(tmp_path: Path) -> None:
    path = tmp_path / "musique_s.json"
    path.write_text(json.dumps(MUSIQUE, indent=4))
    assert read_questions(path) == [
        Question("musique_s", 0, "How many?", ["2", "two"], ["one", "Two\n2"]),
        Question("musique_s", 1, "What colour?", ["blue"], ["blue"]),
    ]


def test_lines_of_records_with_context(tmp_path: Path) -> None:
    path = tmp_path / "hotpot.jsonl"
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in HOTPOT) + "\n\n", "utf-8")
    assert read_questions(path) == [
        Question("hotpot", 0, "Who\u2028sings?", ["Rush"], ["Rush\nA band. They sing.", "Geddy Lee\nA bassist."])
    ]


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        '[{"question": "Who?"}]',
        "[1]",
        '[{"question": "Who?", "answers": [], "ctxs": [{"title": "", "text": "x"}]}]',
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json holds no questions"):
        read_questions(path)


def test_the_example_corpus() -> None:
    def count(text: str) -> int:
        return len(text.split())

    questions = read_corpus(count, tokens=1000)
    assert len(questions) > 100
    assert len({question.text for question in questions}) == len(questions)
    assert all(sum(map(count, question.passages)) >= 1000 for question in questions)
    assert questions == read_corpus(count, tokens=1000)
    told = sum(question.answers[0].lower() in " ".join(question.passages).lower() for question in questions)
    assert told > len(questions) / 2  # others take some arithmetic, or are said in other words
