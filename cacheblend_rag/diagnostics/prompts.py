"""The prompts that ``cacheblend doctor`` tries: the user's own, or some out of the store, or sample text."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from cacheblend_rag.catalog import Catalog
from cacheblend_rag.diagnostics.sweep import AskedPrompt
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.profiling import render_question
from cacheblend_rag.profiling_data import passages_of, read_questions

if TYPE_CHECKING:
    from cacheblend_rag.engines.transformers import TransformersEngine

_PASSAGES = 6
_QUOTED = 4  # words of a passage in a question: more would be found as a run of it


def sample_prompts(engine: TransformersEngine, count: int) -> list[AskedPrompt]:
    """Prompts about things that don't exist, out of this package.

    Args:
        engine: Its store may be written to: the passages are warmed.
        count: Most prompts.
    """
    questions = read_questions()
    made = []
    for number in range(min(count, len(questions))):
        passages = passages_of(questions, number)
        engine.warm(passages)
        made.append(AskedPrompt(render_question(engine, passages, questions[number].text), engine))
    return made


def prompts_of_store(engine: TransformersEngine, store: Path, count: int) -> list[AskedPrompt]:
    """Prompts out of the texts of a store's catalogue, in random order, always the same; none if it has none."""
    with contextlib.closing(Catalog(store, engine.scope)) as catalog:
        texts = [text for source in catalog.sources() for text in catalog.texts(source)]
    chance = random.Random(0)
    made = []
    for _ in range(count if texts else 0):
        passages = chance.sample(texts, min(_PASSAGES, len(texts)))
        beginning = " ".join(chance.choice(passages).split()[:_QUOTED])
        question = f'What else do the passages say about "{beginning}"?'
        made.append(AskedPrompt(render_question(engine, passages, question), engine))
    return made


def read_prompts(path: Path, engine: TransformersEngine, beside: TransformersEngine) -> list[AskedPrompt]:
    """The user's prompts.

    Args:
        path: JSON lines, each with ``prompt``, a text whose chunks are in the store, or with ``question`` and
            ``passages``, a list of texts.
        engine: What knows the store's chunks.
        beside: Its store may be written to: passages are warmed there.

    Raises:
        ConfigError: the file has another form, or holds nothing.
        OSError: it can't be read.
    """
    made = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not JSON: {error}") from error
        made.append(_prompt(record, place, engine, beside))
    if not made:
        raise ConfigError(f"{path} holds no prompts")
    return made


def _prompt(record: Any, place: str, engine: TransformersEngine, beside: TransformersEngine) -> AskedPrompt:
    if isinstance(record, dict):
        prompt, question, passages = (record.get(name) for name in ("prompt", "question", "passages"))
        if isinstance(prompt, str) and prompt.strip():
            return AskedPrompt(prompt, engine)
        if isinstance(question, str) and question.strip() and _are_texts(passages):
            beside.warm(passages)
            return AskedPrompt(render_question(beside, passages, question), beside)
    raise ConfigError(f'{place}: there must be a "prompt", or a "question" and "passages", a list of texts')


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, str) and one.strip() for one in value)
