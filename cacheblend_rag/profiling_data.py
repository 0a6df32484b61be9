"""What a model's profile is measured on: questions, and passages that answer them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

from cacheblend_rag.errors import ConfigError

BUILT_IN = Path(__file__).with_name("profiling_questions.jsonl")
"""Sixteen questions on twenty-four short passages about things that don't exist; nine of them need two passages."""

PASSAGES = 8
"""Passages of a prompt, where there are so many."""


@dataclasses.dataclass(frozen=True)
class ProfilingQuestion:
    """A question and what answers it.

    Attributes:
        text: The question.
        answer: The gold answer.
        passages: Those that the answer is in, at least one.
    """

    text: str
    answer: str
    passages: tuple[str, ...]


def read_questions(path: Path = BUILT_IN) -> list[ProfilingQuestion]:
    """Read a file of JSON lines, each an object with ``question``, ``answer`` and ``passages``, a list of texts.

    Raises:
        ConfigError: the file has another form, or holds nothing.
        OSError: it can't be read.
    """
    questions = []
    try:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
            if line.strip():
                questions.append(_question(json.loads(line), f"{path}, line {number}"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} does not hold one JSON object a line: {error}") from error
    if not questions:
        raise ConfigError(f"{path} holds no questions")
    return questions


def passages_of(questions: Sequence[ProfilingQuestion], number: int) -> list[str]:
    """The passages of one question's prompt: its own among some of the others', in random order, always the same."""
    chance = random.Random(number)
    own = questions[number].passages
    others = list(dict.fromkeys(text for one in questions for text in one.passages if text not in own))
    chosen = [*own, *chance.sample(others, min(len(others), max(PASSAGES - len(own), 0)))]
    chance.shuffle(chosen)
    return chosen


def _question(record: object, place: str) -> ProfilingQuestion:
    if isinstance(record, dict):
        text, answer, passages = (record.get(name) for name in ("question", "answer", "passages"))
        if _is_text(text) and _is_text(answer) and _are_texts(passages):
            return ProfilingQuestion(text, answer, tuple(passages))
    raise ConfigError(f"{place}: there must be a question, an answer and a list of passages, all of them texts")


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))
