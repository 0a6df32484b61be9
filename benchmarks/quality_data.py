"""Questions with their passages: out of files of MuSiQue's or HotpotQA's form, or the example corpus."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import corpus_questions


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and what it is to be answered from.

    Attributes:
        dataset: Where it comes from: the file's name without its suffix.
        number: Its place there, from 0.
        text: What is asked.
        answers: Gold answers, at least one; any of them is right, the first is the one to be scored.
        passages: In prompt order.
    """

    dataset: str
    number: int
    text: str
    answers: list[str]
    passages: list[str]


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions: a JSON list of records, or JSON lines.

    A record holds ``question``; ``answer`` or a list of ``answers``; and its passages as ``ctxs``, a list of objects
    with ``title`` and ``text`` (MuSiQue in the form of CacheBlend's own evaluation), or as ``context``, a list of
    ``[title, sentences]`` (HotpotQA).

    Raises:
        ValueError: the file has another form.
    """
    text = path.read_text("utf-8")
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
        return [_question(path.stem, number, record) for number, record in enumerate(records)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no questions of a known form: {error!r}") from error


def read_corpus(count_tokens: Callable[[str], int], *, tokens: int) -> list[Question]:
    """All questions of the example corpus, in random order, each with its documents among others; always the same.

    Args:
        count_tokens: Counts tokens.
        tokens: Least tokens of passages for each.
    """
    return [
        Question("corpus", number, record["question"], [record["answer"]], passages)
        for number, (record, passages) in enumerate(corpus_questions(count_tokens, tokens=tokens, seed=0))
    ]


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines() would cut at a U+2028 too


def _question(dataset: str, number: int, record: Mapping[str, Any]) -> Question:
    answers = record["answers"] if "answers" in record else [record["answer"]]
    if "ctxs" in record:
        passages = [_passage(one["title"], one["text"]) for one in record["ctxs"]]
    else:
        passages = [_passage(title, "".join(sentences)) for title, sentences in record["context"]]
    if not answers or not passages:
        raise ValueError(f"question {number} has no answer or no passages")
    return Question(dataset, number, record["question"], list(answers), passages)


def _passage(title: str, text: str) -> str:
    return f"{title}\n{text}" if title else text
