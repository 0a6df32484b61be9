"""The prompts that ``cacheblend doctor`` tries: the user's own, or some out of the store, or sample text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from cacheblend_rag.catalog import FILE_NAME, Catalog
from cacheblend_rag.diagnostics.comparing import ANSWER_TOKENS
from cacheblend_rag.diagnostics.sweep import AskedPrompt
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.profiling import render_question
from cacheblend_rag.profiling_data import passages_of, read_questions

if TYPE_CHECKING:
    from cacheblend_rag.diagnostics.subjects import Subject
    from cacheblend_rag.engines.base import Engine

_PASSAGES = 6
_CONSIDERED = 256  # texts of a store that prompts are made from: each is asked for whether it is warm
_NEW = 32  # tokens that may come in front of a prompt, see Comparison.unread
_QUOTED = 4  # words of a passage in a question: more would be found as a run of it


def sample_prompt(subject: Subject, number: int) -> tuple[str, list[str]]:
    """A prompt about things that don't exist, out of this package, and the chunks that it holds."""
    questions = read_questions()
    passages = [f"{subject.tag}{passage}" for passage in passages_of(questions, number)]
    return fitting(subject.engine, passages, questions[number].text)


def sample_prompts(subject: Subject, count: int) -> list[AskedPrompt]:
    """Some such prompts, all of them warm.

    Args:
        subject: Whose model is to answer them.
        count: Most prompts.

    Raises:
        ChunkTooLongError: a passage does not fit the context.
    """
    made = []
    for number in range(min(count, len(read_questions()))):
        prompt, passages = sample_prompt(subject, number)
        made.append(_asked(subject, prompt, subject.warm(passages)))
    return made


def prompts_of_store(subject: Subject, store: Path, count: int) -> list[AskedPrompt]:
    """Prompts out of the texts of a store's catalogue, in random order, always the same; none if it has none."""
    engine = subject.engine
    if not (store / FILE_NAME).exists():  # to open one would make it
        return []
    with contextlib.closing(Catalog(store, engine.scope)) as catalog:
        texts = [text for source in catalog.sources() for text in catalog.texts(source)]
    chance = random.Random(0)
    texts = chance.sample(texts, min(_CONSIDERED, len(texts)))
    texts = [text for text, warm in zip(texts, engine.is_warm(texts), strict=True) if warm]
    made = []
    for _ in range(count if texts else 0):
        passages = chance.sample(texts, min(_PASSAGES, len(texts)))
        beginning = " ".join(chance.choice(passages).split()[:_QUOTED])
        question = f'What else do the passages say about "{beginning}"?'
        made.append(_asked(subject, fitting(engine, passages, question)[0], engine))
    return made


def fitting(engine: Engine, passages: list[str], question: str) -> tuple[str, list[str]]:
    """A prompt that leaves room for an answer, and those of the passages, the first ones, that it holds."""
    room = engine.context_window - ANSWER_TOKENS - _NEW
    while len(engine.token_ids(prompt := render_question(engine, passages, question))) > room and len(passages) > 1:
        passages = passages[:-1]
    return prompt, passages


@dataclasses.dataclass(frozen=True)
class UserPrompt:
    """A line of a file of prompts.

    Attributes:
        text: The whole prompt, or with passages the question.
        passages: What the question is asked about; none: their chunks are in the store.
    """

    text: str
    passages: tuple[str, ...] = ()


def read_prompts(path: Path) -> list[UserPrompt]:
    """The user's prompts.

    Args:
        path: JSON lines, each with ``prompt``, or with ``question`` and ``passages``, a list of texts.

    Raises:
        ConfigError: the file has another form, or holds nothing.
        OSError: it can't be read.
    """
    made = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not JSON: {error}") from error
        made.append(_parse(record, place))
    if not made:
        raise ConfigError(f"{path} holds no prompts")
    return made


def asked_prompts(prompts: Sequence[UserPrompt], subject: Subject) -> list[AskedPrompt]:
    """The user's prompts for the engines that know their chunks.

    Args:
        prompts: What was read. Chunks of whole prompts are in the store, or not known; passages are to be warmed.
        subject: Whose model is to answer them.
    """
    apart = subject.warm([])
    made = []
    for prompt in prompts:
        if prompt.passages:
            made.append(_asked(subject, render_question(apart, prompt.passages, prompt.text), apart, prompt.passages))
        else:
            made.append(_asked(subject, prompt.text, subject.engine))
    return made


def _asked(subject: Subject, text: str, engine: Engine, passages: tuple[str, ...] = ()) -> AskedPrompt:
    return AskedPrompt(text, engine, subject.comparison(engine), passages)


def _parse(record: Any, place: str) -> UserPrompt:
    if isinstance(record, dict):
        prompt, question, passages = (record.get(name) for name in ("prompt", "question", "passages"))
        if isinstance(prompt, str) and prompt.strip():
            return UserPrompt(prompt)
        if isinstance(question, str) and question.strip() and _are_texts(passages):
            return UserPrompt(question, tuple(passages))
    raise ConfigError(f'{place}: there must be a "prompt", or a "question" and "passages", a list of texts')


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) and one.strip() for one in value)
