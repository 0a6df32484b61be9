"""Reads prompts and chunks with a transformers model: the blend, and the plain prefill behind it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray

from cacheblend_rag.blending import blend
from cacheblend_rag.chunks import ChunkKV, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.decision import BlendCosts, decide
from cacheblend_rag.engines.transformers_forward import PromptForward
from cacheblend_rag.engines.transformers_model import LoadedModel
from cacheblend_rag.errors import PolicyError
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.matching import Segment
from cacheblend_rag.memory_plan import explained
from cacheblend_rag.recording import Recorder
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.store.codecs import encode
from cacheblend_rag.store.meter import ReadMeter
from cacheblend_rag.trace import BlendTrace

logger = logging.getLogger(__name__)

_WHATEVER_IT_TAKES = BlendConfig(mode="blend")
_SHORTER = "shorten the prompt or max_tokens, ask for fewer answers at a time, or lower memory_bytes"


@dataclasses.dataclass(frozen=True, eq=False)
class KVDeviations:
    """How far the KV of known chunks, shifted to where they stand in a prompt, is from full prefill's.

    Squared L2 distances over all heads. Nothing of it is known before full prefill: it is for looking into a prompt.

    Attributes:
        positions: int64 ``[matched]``, ascending: tokens of the prompt that known chunks cover.
        keys: float32 ``[layers, matched]``.
        values: Likewise; at a check layer what ``hkvd`` measures there, but behind the exact KV of all layers below.
    """

    positions: NDArray[np.int64]
    keys: NDArray[np.float32]
    values: NDArray[np.float32]


@dataclasses.dataclass
class ReadPrompt:
    """A prompt whose KV is complete.

    Attributes:
        forward: Appends tokens to it.
        logits: float32 ``[vocabulary]``: logits of the first token to generate.
        stats: How it was read; the times of the first token are not filled in yet.
        segments: The runs whose KV came from chunks.
        trace: What the blend measured and chose, if that was asked for and something was blended.
    """

    forward: PromptForward
    logits: torch.Tensor
    stats: BlendStats
    segments: tuple[Segment, ...] = ()
    trace: BlendTrace | None = None


class PromptReader:
    """Not safe for several threads at once: the engine serialises calls.

    Args:
        loaded: The model.
        library: The warm chunks, whose scope names the primer.

    Attributes:
        counts: Faults survived: ``chunk_fault`` (a matched chunk could not be read) and ``blend_fault`` (an exception
            in the blend; the prompt was prefilled).
        meter: Reads the chunks.
        costs: What mode ``"auto"`` takes into account.
    """

    def __init__(self, loaded: LoadedModel, library: ChunkLibrary) -> None:
        self.counts: Counter[str] = Counter()
        self.costs = BlendCosts()
        self._loaded = loaded
        self._library = library
        self.meter = ReadMeter(library.store)
        self._primer_ids = np.asarray(library.scope.primer_ids, np.int32)
        self._primer_kv = loaded.empty_kv(len(self._primer_ids))
        if len(self._primer_ids):
            primer = self._forward(self._primer_ids, self._primer_kv)
            with torch.inference_mode():
                primer.recompute(torch.arange(len(self._primer_ids)))

    def beside(self, library: ChunkLibrary) -> PromptReader:
        """A reader of other chunks of the same primer, which is not computed again."""
        other = copy.copy(self)
        other.counts = Counter()
        other.meter = ReadMeter(library.store)
        other._library = library
        return other

    @torch.inference_mode()
    def read_chunk(self, ids: TokenIds) -> ChunkKV:
        """Prefill a chunk alone behind the primer, whose own KV is not part of the result.

        Args:
            ids: int32 ``[tokens]``, at least one.
        """
        primer, total = len(self._primer_ids), len(self._primer_ids) + len(ids)
        with explained(
            f"prefilling a chunk of {len(ids)} tokens", "split it into smaller chunks, or lower memory_bytes"
        ):
            kv = self._loaded.empty_kv(total)
            kv[:, :, :primer] = self._primer_kv
            self._forward(np.concatenate([self._primer_ids, ids]), kv).recompute(torch.arange(primer, total))
        scope = self._library.scope
        encoded, scales = encode(kv[:, :, primer:].cpu().contiguous(), scope.fingerprint.codec)
        return ChunkKV(scope.key(ids), scope, ids, primer, encoded, scales)

    @torch.inference_mode()
    def read_prompt(self, ids: TokenIds, total: int, config: BlendConfig, *, trace: bool = False) -> ReadPrompt:
        """Read a prompt the fastest way that is right. Whatever goes wrong in a blend ends in plain prefill.

        Args:
            ids: int32 ``[tokens]``, at least one.
            total: Tokens of the prompt and of the longest answer to it.
            config: The request's settings.
            trace: Whether to tell what the blend measured and chose.

        Raises:
            PolicyError: the selection policy broke its contract.
        """
        if config.mode == "off":
            return self._prefill(ids, total, "mode is off")
        if total > self._loaded.full_attention_tokens:
            limit = self._loaded.full_attention_tokens
            return self._prefill(ids, total, f"longer than the {limit} tokens that see each other fully")
        try:
            return self.try_blend(ids, total, config, trace=trace)
        except PolicyError:
            raise
        except Exception:
            logger.exception("blending failed, the prompt is prefilled plainly")
            self.counts["blend_fault"] += 1
        # Out here the error is gone, and with it what it held of the blend's memory.
        return self._prefill(ids, total, "blending failed, see the log")

    def _prefill(self, ids: TokenIds, total: int, reason: str) -> ReadPrompt:
        with explained(f"reading a prompt of {len(ids)} tokens", _SHORTER):
            forward = self._forward(ids, self._loaded.empty_kv(total))
            started = time.perf_counter()
            logits = forward.recompute(torch.arange(len(ids)))
        stats = BlendStats(len(ids), missed_tokens=len(ids), reason=reason, recompute=time.perf_counter() - started)
        return ReadPrompt(forward, logits, stats)

    @torch.inference_mode()
    def read_deviations(self, ids: TokenIds) -> KVDeviations:
        """Full prefill, and how far known chunks' shifted KV is from it; see :class:`KVDeviations`.

        Args:
            ids: int32 ``[tokens]``, at least one.
        """
        full = self._forward(ids, self._loaded.empty_kv(len(ids)))
        full.recompute(torch.arange(len(ids)))
        _, layout, cached = self._with_known_chunks(ids, len(ids), _WHATEVER_IT_TAKES)
        distances = full.squared_distances(cached, layout.matched)
        return KVDeviations(layout.matched.numpy(), distances[:, 0], distances[:, 1])

    @torch.inference_mode()
    def try_blend(self, ids: TokenIds, total: int, config: BlendConfig, *, trace: bool = False) -> ReadPrompt:
        """As :meth:`read_prompt`, with no prefill behind it: whatever goes wrong in a blend is raised."""
        stats, layout, forward = self._with_known_chunks(ids, total, config)
        recorder = Recorder() if trace and layout.segments else None
        result = blend(forward, layout, config, recorder)
        stats.recomputed_tokens = len(result.recomputed)
        stats.reused_tokens = len(layout.matched) - len(result.recomputed)
        stats.policy = result.policy
        stats.select, stats.recompute = result.select_seconds, result.recompute_seconds
        told = None
        if recorder is not None:
            told = recorder.trace(layout, result.recomputed)
            stats.deviation = told.deviation
        return ReadPrompt(forward, result.logits, stats, layout.prefix_segments + layout.segments, told)

    def _with_known_chunks(
        self, ids: TokenIds, total: int, config: BlendConfig
    ) -> tuple[BlendStats, PromptLayout, PromptForward]:
        """A prompt whose known chunks' KV is in place, as far as that is to be used."""
        stats = BlendStats(len(ids))
        unreadable: set[str] = set()
        while True:
            started = time.perf_counter()
            segments = self._library.match(ids, exclude=unreadable)
            layout = PromptLayout.of_prompt(ids, segments, self._primer_ids)
            stats.decision, stats.reason = decide(
                layout, config, len(self._primer_kv), self.costs.overhead(layout, config, len(self._primer_kv))
            )
            if stats.decision == "prefill":
                layout = PromptLayout.build(len(ids))
            elif stats.decision == "prefix":
                layout = layout.without_segments()
            matched = time.perf_counter()
            forward = self._forward(ids, self._loaded.empty_kv(total))
            lost = self._load(forward, layout, stats)
            stats.match += matched - started
            stats.load += time.perf_counter() - matched
            if not lost:
                break
            # As if these chunks were not warm: others may cover their tokens.
            unreadable |= lost
            self.counts["chunk_fault"] += len(lost)
        stats.prefix_tokens = layout.prefix
        stats.missed_tokens = len(layout.missed)
        stats.segments = len(layout.segments) + len(layout.prefix_segments)
        stats.faults = len(unreadable)
        return stats, layout, forward

    def _forward(self, ids: TokenIds, kv: torch.Tensor) -> PromptForward:
        return PromptForward(self._loaded.model, torch.from_numpy(ids.astype(np.int64)).to(kv.device), kv)

    def _load(self, forward: PromptForward, layout: PromptLayout, stats: BlendStats) -> set[str]:
        """Put cached KV in place; returns the keys of chunks that can't be read, for which places stay empty."""
        forward.place_exact(self._primer_kv[:, :, : layout.prefix])
        lost = set()
        for segment in layout.prefix_segments + layout.segments:
            read = self.meter.read(segment.key)
            if read is None:
                lost.add(segment.key)
            else:
                stats.count_read(read.tier, read.chunk.nbytes, read.seconds)
                forward.place(read.chunk, segment.offset, segment.length, segment.start)
        forward.exact_tokens = layout.prefix
        return lost
