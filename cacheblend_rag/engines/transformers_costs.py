"""Finds out on a loaded model what a blend takes beside the tokens that it computes.

A pass takes some time however few rows it has, and chunks have to be put in place. A model that is small for its device
has prefilled thousands of tokens meanwhile: mode ``"auto"`` has to know.
"""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import torch

from cacheblend_rag.chunks import ChunkKV, ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.decision import BlendCosts
from cacheblend_rag.engines.transformers_model import LoadedModel
from cacheblend_rag.engines.transformers_reader import PromptReader
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.store import MemoryStore
from cacheblend_rag.store.codecs import encode

logger = logging.getLogger(__name__)

_QUESTION = 32  # tokens
_SHORT, _LONG = 256, 1024  # tokens of chunks in a prompt
_RUNS = 4  # that the short one is cut into
_PREFILLS = (32, 128, 512, 2048)  # tokens: more gain little
_MOST_SECONDS = 0.1  # for prefill of the short one: if it takes longer, a blend's other costs are little beside it
_ENOUGH_SECONDS = 1.0  # of a prompt that is read again: no start waits longer for a slow model to be slow again
_STORE_BYTES = 1 << 34
_OFF, _BLEND = BlendConfig(mode="off"), BlendConfig(mode="blend")


def measure_costs(loaded: LoadedModel, reader: PromptReader, scope: ChunkScope) -> BlendCosts:
    """Time prefill, and blends of made-up chunks by the default policy; nothing of them is kept.

    Three prompts tell what a blend takes in any case, for each run of a chunk, and for each token of it: one run, the
    same tokens in several, and a longer run.

    Args:
        loaded: The model.
        reader: Reads its prompts; what is read here is no concern of it.
        scope: Its primer and its codec are what chunks will have.

    Returns:
        The costs; none where they are little beside what tokens take, or can't be told.
    """
    try:
        return _measure(loaded, reader, scope)
    except Exception:  # out of memory, perhaps: nothing depends on it but which short prompts are blended
        logger.debug("a blend could not be timed", exc_info=True)
        return BlendCosts()


def _measure(loaded: LoadedModel, reader: PromptReader, scope: ChunkScope) -> BlendCosts:
    library = ChunkLibrary(MemoryStore(_STORE_BYTES), scope)
    reader = reader.beside(library)
    generator = np.random.default_rng(0)

    def some(tokens: int) -> TokenIds:
        return generator.integers(loaded.model.config.vocab_size, size=tokens, dtype=np.int32)

    token = math.inf
    for tokens in _PREFILLS:
        if tokens > loaded.full_attention_tokens:
            break
        seconds = _seconds(reader, some(tokens), _OFF)
        token = min(token, seconds / tokens)
        if seconds > _MOST_SECONDS:
            break
    if token * (_SHORT + _QUESTION) > _MOST_SECONDS:
        return BlendCosts()

    def blend_seconds(runs: int, tokens: int) -> float:
        """Of a prompt, beside what prefill of the tokens takes that are computed."""
        chunks = [some(tokens // runs) for _ in range(runs)]
        for ids in chunks:
            library.store.put(_made_up(loaded, scope, ids))
        ids = np.concatenate([*chunks, some(_QUESTION)])
        read = reader.read_prompt(ids, len(ids), _BLEND).stats
        if read.decision != "blend":
            raise RuntimeError(read.reason)
        # The question runs twice: what it reads is looked at before anything is recomputed.
        computed = read.recomputed_tokens + read.missed_tokens + _QUESTION
        return _seconds(reader, ids, _BLEND) - computed * token

    one, several, long = blend_seconds(1, _SHORT), blend_seconds(_RUNS, _SHORT), blend_seconds(1, _LONG)
    run = max(0.0, (several - one) / (_RUNS - 1))
    reused = max(0.0, (long - one) / (_LONG - _SHORT))
    fixed = max(0.0, one - run - _SHORT * reused)
    return BlendCosts(fixed / token, run / token, reused / token)


def _made_up(loaded: LoadedModel, scope: ChunkScope, ids: TokenIds) -> ChunkKV:
    layers, kv_heads, head_dim = loaded.kv_shape
    kv, scales = encode(
        torch.ones((layers, 2, len(ids), kv_heads, head_dim), dtype=loaded.model.dtype), scope.fingerprint.codec
    )
    return ChunkKV(scope.key(ids), scope, ids, len(scope.primer_ids), kv, scales)


def _seconds(reader: PromptReader, ids: TokenIds, config: BlendConfig) -> float:
    """What reading a prompt takes up to its logits."""
    took: list[float] = []
    while len(took) < 3 and sum(took) < _ENOUGH_SECONDS:  # the first one may have to choose kernels
        started = time.perf_counter()
        reader.read_prompt(ids, len(ids), config).logits[0].item()
        took.append(time.perf_counter() - started)
    return min(took)
