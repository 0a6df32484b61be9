"""Measures on a loaded model whether blending is exact where it has to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cacheblend_rag.chunks import ChunkKV, ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.transformers_forward import PromptForward
from cacheblend_rag.engines.transformers_model import LoadedModel
from cacheblend_rag.engines.transformers_reader import PromptReader
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.store import MemoryStore

_STORE_BYTES = 1 << 34
_SHIFT = 97  # tokens: no power of two, no multiple of anything in RoPE
_RATIOS = (0.0, 0.15)


@dataclasses.dataclass(frozen=True, eq=False)
class Exactness:
    """Differences are the largest of the logits after a prompt's last token.

    Attributes:
        rounding: Full prefill in two pieces against full prefill in one: what is no error.
        everything: A blend that recomputes all tokens against full prefill.
        exact_kv: By ratio: a blend whose chunks' KV was taken from full prefill of the very prompt, against it.
        shift: float32 ``[layers]``: keys shifted by some positions against those computed there, as a share of the
            layer's largest key.
    """

    rounding: float
    everything: float
    exact_kv: dict[float, float]
    shift: NDArray[np.float32]


@torch.inference_mode()
def measure_exactness(loaded: LoadedModel, scope: ChunkScope, chunks: Sequence[TokenIds], ids: TokenIds) -> Exactness:
    """Measure, with a store of its own.

    Args:
        loaded: The model.
        scope: Namespace, model and primer.
        chunks: int32 each: chunks that the prompt holds.
        ids: int32 ``[tokens]``: the prompt.
    """
    library = ChunkLibrary(MemoryStore(_STORE_BYTES), scope)
    reader = PromptReader(loaded, library)
    for chunk in chunks:
        library.store.put(reader.read_chunk(chunk))
    plain, kv = _prefill(loaded, ids)
    half = len(ids) // 2
    in_two, _ = _prefill(loaded, ids, torch.arange(half), torch.arange(half, len(ids)))

    def differs(by: PromptReader, ratio: float) -> float:
        read = by.read_prompt(ids, len(ids), BlendConfig(mode="blend", recompute_ratio=ratio))
        return float((read.logits - plain).abs().max()) if read.stats.decision == "blend" else float("nan")

    everything = differs(reader, 1.0)
    exact_library = ChunkLibrary(MemoryStore(_STORE_BYTES), scope)
    for segment in library.match(ids):
        known = library.read(segment.key)
        assert known is not None  # it has just been stored, in memory
        exact = torch.zeros_like(known.kv, dtype=kv.dtype)
        exact[:, :, segment.offset : segment.offset + segment.length] = kv[:, :, segment.start : segment.end]
        start = segment.start - segment.offset
        exact_library.store.put(ChunkKV(segment.key, scope, known.ids, start, exact))
    exact_reader = PromptReader(loaded, exact_library)
    return Exactness(
        rounding=float((in_two - plain).abs().max()),
        everything=everything,
        exact_kv={ratio: differs(exact_reader, ratio) for ratio in _RATIOS},
        shift=_shift_errors(loaded, scope, ids, kv),
    )


def _prefill(
    loaded: LoadedModel, ids: TokenIds, *pieces: torch.Tensor, first_position: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    kv = loaded.empty_kv(len(ids))
    forward = PromptForward(
        loaded.model, torch.from_numpy(ids.astype(np.int64)).to(kv.device), kv, first_position=first_position
    )
    for piece in pieces or (torch.arange(len(ids)),):
        logits = forward.recompute(piece)
    return logits, kv


def _shift_errors(loaded: LoadedModel, scope: ChunkScope, ids: TokenIds, kv: torch.Tensor) -> NDArray[np.float32]:
    """As a chunk that was computed elsewhere is moved here, without rounding in a store."""
    _, moved = _prefill(loaded, ids, first_position=_SHIFT)
    forward = PromptForward(loaded.model, torch.from_numpy(ids.astype(np.int64)).to(kv.device), torch.empty_like(kv))
    forward.place(ChunkKV("", scope, ids, _SHIFT, moved), 0, len(ids), 0)
    expected = kv[:, 0].float()
    errors = (forward.keys().float() - expected).abs().amax(dim=(1, 2, 3)) / expected.abs().amax(dim=(1, 2, 3))
    found: NDArray[np.float32] = errors.cpu().numpy()
    return found
