"""Prompts out of an ingested corpus, for the commands that ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cacheblend_rag.errors import CacheBlendError

if TYPE_CHECKING:
    from cacheblend_rag.catalog import Passage
    from cacheblend_rag.chunks import ChunkScope
    from cacheblend_rag.engines.base import Engine

_SYSTEM = "Answer the question from the passages, briefly. If they do not hold the answer, say so."


def messages(question: str, passages: Sequence[Passage]) -> list[dict[str, str]]:
    """A question about some passages, as a chat."""
    # Passages first: the question reads them, and what a policy takes for the question is the end of the prompt.
    content = "\n\n".join([*(passage.text for passage in passages), f"Question: {question}"])
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]


def retrieve(engine: Engine, engine_name: str, store: Path, question: str, top_k: int) -> list[Passage]:
    """The passages of the corpus most like a question, at most ``top_k``, at least one.

    Raises:
        CacheBlendError: the store holds no corpus for this model, or no passage is like the question.
    """
    from cacheblend_rag.catalog import Catalog

    with Catalog(store, engine.scope) as catalog:
        if not catalog.sources():
            what = what_store_lacks(engine, engine_name, store) or f"store {store} holds no corpus to search"
            namespace = engine.scope.namespace
            how = f"cacheblend ingest DIR --model {engine.model_name} --store {store} --namespace {namespace}"
            raise CacheBlendError(f"{what}; to ingest a corpus for this model: {how}")
        passages = catalog.search(question, top_k)
    if not passages:
        raise CacheBlendError("no passage of the corpus shares a word with the question: ask it in other words")
    return passages


def what_store_lacks(engine: Engine, engine_name: str, store: Path) -> str:
    """Empty if the store holds chunks of the engine's scope, or none at all; otherwise a phrase that tells whose."""
    from cacheblend_rag.store import open_store

    if engine_name == "server":  # its chunks are elsewhere: only the catalogue is here
        return ""
    mine = engine.scope
    with contextlib.closing(open_store(store, memory_bytes=0)) as opened:
        held = {entry.scope for entry in opened.entries()}
    if mine in held or not held:
        return ""
    others = sorted({_describe(scope, mine) for scope in held})
    return f"store {store} holds no chunks of {_describe(mine, mine)}, only of {', '.join(others)}"


def _describe(scope: ChunkScope, mine: ChunkScope) -> str:
    model = scope.fingerprint
    codec = "" if model.codec == "raw" else f", codec {model.codec}"
    other_primer = ", another primer" if scope.primer_ids != mine.primer_ids else ""
    return f"{model.name} ({model.dtype}{codec}, namespace {scope.namespace}{other_primer})"
