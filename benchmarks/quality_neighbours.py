"""Chunks read behind a related neighbour: ideas for ingestion that are measured, not in the product.

The neighbour of a passage is the most similar of the other passages of its prompt, by the words they share. It stands
for the most similar passage of a corpus.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import torch

from cacheblend_rag.chunks import ChunkKV, TokenIds
from cacheblend_rag.engines.transformers import TransformersEngine

_WORD = re.compile(r"\w+")


def similarity(texts: list[str]) -> np.ndarray:
    """Cosine of word counts, weighted by how few of the texts have a word: ``[texts, texts]``."""
    counts = [Counter(_WORD.findall(text.lower())) for text in texts]
    having = Counter(word for count in counts for word in count)
    words = {word: column for column, word in enumerate(having)}
    vectors = np.zeros((len(texts), len(words)))
    for row, count in enumerate(counts):
        for word, number in count.items():
            vectors[row, words[word]] = (1 + math.log(number)) * math.log(1 + len(texts) / having[word])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return vectors @ vectors.T


def neighbours(passages: list[str]) -> list[str]:
    """The neighbour of each passage; of a single one, itself."""
    alike = similarity(passages)
    if len(passages) > 1:
        np.fill_diagonal(alike, -1)
    return [passages[n] for n in alike.argmax(axis=1)]


def best_last(passages: list[str], question: str) -> list[str]:
    """The passages in another order: the more similar to the question, the nearer to it."""
    alike = similarity([question, *passages])[0, 1:]
    return [passages[n] for n in np.argsort(alike, kind="stable")]


def warm_behind_neighbours(engine: TransformersEngine, passages: list[str], prefix: str) -> None:
    """Warm passages that were read behind a text and their neighbour.

    Args:
        engine: Has no primer, and none of them is warm.
        passages: Texts.
        prefix: The text.
    """
    before = engine._prompt_ids(prefix)
    texts = engine._encode_chunks(passages)
    for ids, neighbour in zip(texts, engine._encode_chunks(neighbours(passages)), strict=True):
        engine.library.store.put(_read_behind(engine, np.concatenate([before, neighbour]), ids))


def sensitivity(engine: TransformersEngine, passages: list[str]) -> dict[str, torch.Tensor]:
    """How far the values of warm passages move if their neighbours stand before them, behind the engine's primer.

    Returns:
        By key of a chunk, float32 ``[tokens]``: L2 norm over heads, mean over layers.
    """
    primer = np.asarray(engine.scope.primer_ids, np.int32)
    found = {}
    texts = engine._encode_chunks(passages)
    for ids, neighbour in zip(texts, engine._encode_chunks(neighbours(passages)), strict=True):
        moved = _read_behind(engine, np.concatenate([primer, neighbour]), ids)
        known = engine.library.read(moved.key)
        assert known is not None
        found[moved.key] = (moved.kv[:, 1].float() - known.kv[:, 1].float()).norm(dim=(2, 3)).mean(dim=0)
    return found


@torch.inference_mode()
def _read_behind(engine: TransformersEngine, before: TokenIds, ids: TokenIds) -> ChunkKV:
    """A chunk read behind other tokens, their KV dropped."""
    total = len(before) + len(ids)
    kv = engine._loaded.empty_kv(total)
    engine._reader._forward(np.concatenate([before, ids]), kv).recompute(torch.arange(total))
    scope = engine.scope
    return ChunkKV(scope.key(ids), scope, ids, len(before), kv[:, :, len(before) :].cpu().contiguous())
