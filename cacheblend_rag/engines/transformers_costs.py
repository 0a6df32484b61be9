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

_AROUND = 32  # tokens before the chunks of a prompt, which could else be taken for its exact prefix, and behind them
_SHORT, _LONG = 256, 1024  # tokens of chunks
_RUNS = 4  # that the short ones are cut into
_PREFILLS = (32, 128, 512, 2048, 8192)  # tokens
_GAIN = 0.9  # share of a token's time that a longer prefill has to stay below, or longer ones are not tried
_MOST_SECONDS = 0.1  # for prefill of a short prompt: if it takes longer, a blend's other costs are little beside it
_ENOUGH_SECONDS = 1.0  # of reading a prompt again and again: no start waits long for a slow model to be slow again
_STORE_BYTES = 1 << 34
_OFF = BlendConfig(mode="off")
_REUSE, _BLEND = BlendConfig(mode="blend", recompute_ratio=0.0), BlendConfig(mode="blend")


def measure_costs(loaded: LoadedModel, reader: PromptReader, scope: ChunkScope) -> BlendCosts:
    """Time prefill, and blends of made-up chunks; nothing of them is kept.

    Four blends tell apart what a blend takes in any case, for choosing, for each run of a chunk, and for each token of
    it: full reuse of one run, the same by the default policy and ratio, full reuse of the same tokens in several runs,
    and of a longer run.

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
        before, seconds = token, _seconds(reader, some(tokens), _OFF)
        token = min(token, seconds / tokens)
        if seconds > _MOST_SECONDS or token > _GAIN * before:
            break
    if token * (_SHORT + 2 * _AROUND) > _MOST_SECONDS:
        return BlendCosts()

    def blend_seconds(runs: int, tokens: int, config: BlendConfig) -> float:
        """Of a prompt, beside what prefill of the tokens takes that are computed."""
        chunks = [some(tokens // runs) for _ in range(runs)]
        for ids in chunks:
            library.store.put(_made_up(loaded, scope, ids))
        ids = np.concatenate([some(_AROUND), *chunks, some(_AROUND)])
        read = reader.try_blend(ids, len(ids), config).stats
        # Where something is chosen, the question runs twice: what it reads is looked at before anything is recomputed.
        asked = _AROUND if read.recomputed_tokens else 0
        computed = read.recomputed_tokens + read.missed_tokens + asked
        return _seconds(reader, ids, config) - computed * token

    long = min(_LONG, loaded.full_attention_tokens - 2 * _AROUND)
    reuse, blend = blend_seconds(1, _SHORT, _REUSE), blend_seconds(1, _SHORT, _BLEND)
    run = max(0.0, (blend_seconds(_RUNS, _SHORT, _REUSE) - reuse) / (_RUNS - 1))
    reused = max(0.0, (blend_seconds(1, long, _REUSE) - reuse) / (long - _SHORT)) if long >= 2 * _SHORT else 0.0
    fixed = max(0.0, reuse - run - _SHORT * reused)
    return BlendCosts(fixed / token, max(0.0, blend - reuse) / token, run / token, reused / token)


def _made_up(loaded: LoadedModel, scope: ChunkScope, ids: TokenIds) -> ChunkKV:
    layers, kv_heads, head_dim = loaded.kv_shape
    kv, scales = encode(
        torch.ones((layers, 2, len(ids), kv_heads, head_dim), dtype=loaded.model.dtype), scope.fingerprint.codec
    )
    return ChunkKV(scope.key(ids), scope, ids, len(scope.primer_ids), kv, scales)


def _seconds(reader: PromptReader, ids: TokenIds, config: BlendConfig) -> float:
    """What reading a prompt takes up to its logits."""
    read = reader.read_prompt if config.mode == "off" else reader.try_blend
    took: list[float] = []
    # The first time may have to choose kernels, so it counts alone only if it is far from anything quick.
    while len(took) < 3 and sum(took) < (5 * _ENOUGH_SECONDS if len(took) == 1 else _ENOUGH_SECONDS):
        started = time.perf_counter()
        read(ids, len(ids), config).logits[0].item()
        took.append(time.perf_counter() - started)
    return min(took)
