"""The half of the connector that lives in every worker: blends prompts and stores chunks, with the model at hand."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from cacheblend_rag.blending import BlendResult, blend_passes
from cacheblend_rag.chunks import ChunkKV, ChunkScope
from cacheblend_rag.decision import decide
from cacheblend_rag.errors import PolicyError
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.matching import Segment
from cacheblend_rag.prefetching import Prefetcher
from cacheblend_rag.recording import Recorder
from cacheblend_rag.stats import BlendStats, Tier
from cacheblend_rag.store import ChunkStore, TieredStore
from cacheblend_rag.store.codecs import encode, stored_dtype
from cacheblend_rag.store.meter import ReadMeter
from cacheblend_rag.trace import BlendTrace
from cacheblend_rag.vllm.forward import PagedForward
from cacheblend_rag.vllm.messages import BlendJob, SaveJob, StepJobs
from cacheblend_rag.vllm.model import PagedModel
from cacheblend_rag.vllm.packing import run_blends

logger = logging.getLogger(__name__)

_READERS = 4  # threads: one alone, which also checks and pins what it reads, is slower than a fast disk
_REMEMBERED = 1024  # choices: for 32k tokens, a megabyte each where deviations were measured, else a tenth of it


@dataclasses.dataclass(frozen=True)
class _Choice:
    hit: int
    first: int
    length: int
    positions: torch.Tensor
    deviation_passes: list[tuple[torch.Tensor, int]]


class _Choices:
    """Which tokens were recomputed in prompts whose blended blocks may be in the prefix cache.

    A repeated prompt finds its full blocks there, and only its end is blended again. With the budget of that end alone,
    the policy would choose other tokens than the first time, and the same prompt would get another answer.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], _Choice] = OrderedDict()

    def repeat(self, job: BlendJob, matched: torch.Tensor, forward: PagedForward) -> torch.Tensor | None:
        """What was chosen of the matched positions, if all of them were decided on before.

        The passes that led to the choice are run again over the rows at hand, for the fresh KV they leave.
        """
        for prompt in (_digest(job), ""):
            choice = self._known.get((job.salt, prompt))
            # With all matched tokens still to be blended, the policy makes the same choice by itself.
            if choice is not None and choice.hit <= job.hit and choice.first < job.hit and matched[-1] < choice.length:
                for rows, layer in choice.deviation_passes:
                    known = rows.cpu().long()
                    if len(left := known[known >= job.hit]):
                        forward.deviations(left, layer)
                self._known.move_to_end((job.salt, prompt))
                positions = choice.positions.cpu().long()
                return positions[torch.isin(positions, matched)]
        return None

    def add(self, job: BlendJob, matched: torch.Tensor, positions: torch.Tensor, forward: PagedForward) -> None:
        """Remember a choice: for this prompt, and for those that begin with it, which have its salt."""
        if not len(matched):
            return
        passes = [(rows.int(), layer) for rows, layer in forward.deviation_passes]
        choice = _Choice(job.hit, int(matched[0]), len(job.token_ids), positions.int(), passes)
        self._known[job.salt, _digest(job)] = choice
        self._known.setdefault((job.salt, ""), choice)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


def _digest(job: BlendJob) -> str:
    return hashlib.blake2b(job.token_ids.tobytes(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Read:
    """How a chunk was read for a prompt. Without its KV: all ranks' heads would be kept until the blend ends."""

    key: str
    tier: Tier
    nbytes: int
    seconds: float


@dataclasses.dataclass
class _Blend:
    """A prompt whose chunks have been read.

    Attributes:
        job: What is to be done.
        stats: What is known so far of how it is read.
        forward: The prompt inside the engine.
        layout: Where the KV of its positions comes from.
        pieces: The chunks of its segments.
        reads: How chunks were read for it.
        is_planned: Whether the layout is the one that was planned: no chunk was lost.
    """

    job: BlendJob
    stats: BlendStats
    forward: PagedForward
    layout: PromptLayout
    pieces: list[tuple[ChunkKV, Segment]]
    reads: list[_Read]
    is_planned: bool


class WorkerHalf:
    """Not safe for several threads: vLLM calls its connectors from one.

    Args:
        model: The worker's model.
        store: Where chunks are.

    Attributes:
        failed_blocks: Blocks that could not be filled; vLLM recomputes their requests.
    """

    def __init__(self, model: PagedModel, store: ChunkStore) -> None:
        self._reports: dict[str, Callable[[], dict[str, Any]]] = {}
        self.failed_blocks: set[int] = set()
        self._model = model
        self._store = store
        if isinstance(store, TieredStore):
            store.keep = model.own_heads  # half the memory and the transfers with two ranks
        self._choices = _Choices()
        self._library: ChunkLibrary | None = None
        self._logged: set[str] = set()
        self._brought: dict[str, int] = {}
        self._meter = ReadMeter(store)
        self._prefetcher = Prefetcher(self._bring, batch=1, threads=_READERS)

    def prefetch(self, keys: Sequence[str]) -> None:
        """Begin to bring chunks from disk to memory; the step does not wait for it."""
        self._prefetcher.add(keys)

    @torch.inference_mode()
    def run_blends(self, jobs: StepJobs) -> bool:
        """Fill the blocks of this step's prompts up to their last token. Whatever goes wrong ends in plain prefill.

        Returns:
            True: every block is filled, or among the failed ones.
        """
        blends = []
        started = time.perf_counter()
        for job in jobs.blends:
            try:
                blends.append(self._read_chunks(job, jobs.scope))
            except Exception as error:
                self._fall_back(job, error)
        try:
            self._place(blends)
            for blend in blends:
                blend.stats.load = time.perf_counter() - started
            self._blend(blends)
        except Exception as error:
            for blend in blends:
                self._fall_back(blend.job, error)
        return self.prefill(jobs.prefills)

    @torch.inference_mode()
    def prefill(self, jobs: Sequence[BlendJob]) -> bool:
        """Fill the blocks of prompts plainly; returns as :meth:`run_blends`."""
        for job in jobs:
            self._prefill(job)
        return True

    @torch.inference_mode()
    def run_saves(self, jobs: StepJobs) -> None:
        """Store the chunks whose KV this step completed. A chunk that can't be stored is reported."""
        for job in jobs.saves:
            try:
                report: dict[str, Any] = {"bytes": self._save(job, jobs.scope)}
            except Exception as error:
                self._log_fault("a chunk could not be stored", error)
                report = {"error": str(error) or repr(error)}
            if self._model.is_first_rank:  # it alone writes chunks
                self._reports[job.request_id] = functools.partial(dict, report)

    def take_reports(self) -> dict[str, dict[str, Any]]:
        """What became of each job since this was last called, by request id; waits for the blends to end."""
        reports, self._reports = self._reports, {}
        return {request_id: report() for request_id, report in reports.items()}

    def take_brought(self) -> dict[str, int]:
        """Bytes of the chunks that have been brought to memory since this was last called, by key."""
        brought = {}
        while self._brought:
            key, nbytes = self._brought.popitem()  # one at a time: the prefetcher may be adding
            brought[key] = nbytes
        return brought if self._model.is_first_rank else {}

    def take_read(self) -> tuple[int, float]:
        """Tokens of chunks that were read from disk since this was last called, and seconds that it took."""
        return self._meter.clock.take() if self._model.is_first_rank else (0, 0.0)

    def _report(
        self,
        job: BlendJob,
        stats: BlendStats,
        result: BlendResult | None = None,
        trace: Callable[[], BlendTrace] | None = None,
    ) -> None:
        def report() -> dict[str, Any]:
            told: dict[str, Any] = {}
            if result is not None:
                stats.select, stats.recompute = result.select_seconds, result.recompute_seconds
            if trace is not None:
                try:
                    found = trace()
                    stats.deviation = found.deviation
                    told["score_range"] = found.score_range
                    if job.trace:
                        told["trace"] = found.to_dict()
                except Exception as error:  # whatever a policy's passes found: the answer is right without it
                    self._log_fault("a blend could not be traced", error)
            return {**stats.to_dict(), **told, "finished_at": time.time()}

        if self._model.is_first_rank:  # all do alike
            self._reports[job.request_id] = report

    def _fall_back(self, job: BlendJob, error: Exception) -> None:
        self._log_fault("blending failed, the prompt is prefilled plainly", error)
        reason = f"blending failed: {error}" if isinstance(error, PolicyError) else "blending failed, see the log"
        self._prefill(job, reason)

    def _log_fault(self, what: str, error: Exception) -> None:
        """Log an exception, the first time; the metrics count them all."""
        log = logger.debug if what in self._logged else logger.error
        self._logged.add(what)
        log(what, exc_info=error)

    def close(self) -> None:
        """Close the store, and let go of what is on the GPU."""
        self._prefetcher.close()
        self._model.kernel_passes = None
        self._store.close()

    def _bring(self, keys: list[str]) -> None:
        """In the prefetcher's thread."""
        for key in keys:
            nbytes = 0  # of one that can't be read: whoever waits for it finds out
            try:
                chunk = self._meter.bring(key, self._fetch)
                nbytes = 0 if chunk is None else chunk.nbytes
            finally:
                self._brought[key] = nbytes

    def _fetch(self, key: str) -> ChunkKV | None:
        """Bring a chunk to memory and pin it there, which belongs to what reading takes."""
        chunk = self._store.get(key)
        if chunk is not None and isinstance(self._store, TieredStore) and self._model.kernel_passes is not None:
            self._model.kernel_passes.stream.pinned.pin(chunk)
        return chunk

    def _read_chunks(self, job: BlendJob, scope: ChunkScope) -> _Blend:
        stats = BlendStats(len(job.token_ids), decision="blend", reason=job.reason)
        primer_ids = np.asarray(scope.primer_ids, np.int32)
        layout = PromptLayout.after_hit(job.token_ids, job.segments, primer_ids, job.hit)
        unreadable: set[str] = set()
        reads: list[_Read] = []
        while True:
            segments = layout.prefix_segments + layout.segments
            pieces = [(self._read(segment.key, reads), segment) for segment in segments]
            lost = self._model.agree([chunk is None for chunk, _ in pieces])
            if not any(lost):
                break
            # As if these chunks were not warm: others may cover their tokens.
            unreadable |= {segment.key for segment, gone in zip(segments, lost, strict=True) if gone}
            layout = PromptLayout.after_hit(job.token_ids, self._rematch(job, scope, unreadable), primer_ids, job.hit)
            stats.decision, stats.reason = decide(layout, job.config, len(self._model.layers), job.overhead)
            if stats.decision != "blend":
                layout = PromptLayout.build(len(job.token_ids), prefix=job.hit)
        stats.prefix_tokens = layout.prefix + sum(segment.length for segment in layout.prefix_segments)
        stats.missed_tokens = len(layout.missed)
        stats.segments = len(segments)
        stats.faults = len(unreadable)
        read = [(chunk, segment) for chunk, segment in pieces if chunk is not None]
        return _Blend(job, stats, self._forward(job), layout, read, reads, not unreadable)

    def _place(self, blends: Sequence[_Blend]) -> None:
        """Put cached KV in place.

        Raises:
            RuntimeError: on some rank it could not be: for want of memory, perhaps. None goes on alone.
        """
        failed = False
        try:
            passes = self._model.kernel_passes
            prompts = [(blend.pieces, blend.forward.block_ids) for blend in blends if blend.pieces]
            on_gpu: set[str] = set()
            if prompts and passes is not None:
                on_gpu = {chunk.key for pieces, _ in prompts for chunk, _ in pieces if passes.stream.holds(chunk.key)}
            if prompts and (passes is None or not passes.stream.place(prompts)):
                on_gpu.clear()  # no use was made of them
                for blend in blends:
                    if blend.pieces:
                        blend.forward.place(blend.pieces)
            for blend in blends:
                _count_reads(blend, on_gpu)
        except Exception as error:
            self._log_fault("cached KV could not be put in place", error)
            failed = True
        if any(self._model.agree([failed])):
            raise RuntimeError("cached KV could not be put in place")

    def _blend(self, blends: Sequence[_Blend]) -> None:
        chosen = [
            self._choices.repeat(blend.job, blend.layout.matched, blend.forward) if blend.is_planned else None
            for blend in blends
        ]
        passes = [
            blend_passes(blend.forward, blend.layout, blend.job.config, known)
            for blend, known in zip(blends, chosen, strict=True)
        ]
        logs = logger.isEnabledFor(logging.DEBUG)
        recorders = [Recorder() if (blend.job.trace or logs) and blend.layout.segments else None for blend in blends]
        passes = [
            one if recorder is None else recorder.listen(one) for one, recorder in zip(passes, recorders, strict=True)
        ]
        ends = run_blends(self._model, [(blend.forward, one) for blend, one in zip(blends, passes, strict=True)])
        if self._model.kernel_passes is not None:  # nothing that comes after asks layer by layer
            self._model.kernel_passes.stream.wait_for_all()
        for blend, known, recorder, end in zip(blends, chosen, recorders, ends, strict=True):
            if isinstance(end, Exception):
                self._fall_back(blend.job, end)
                continue
            if known is None and blend.is_planned:
                self._choices.add(blend.job, blend.layout.matched, end.recomputed, blend.forward)
            blend.stats.recomputed_tokens = len(end.recomputed)
            blend.stats.reused_tokens = len(blend.layout.matched) - len(end.recomputed)
            blend.stats.policy = end.policy
            trace = None if recorder is None else functools.partial(recorder.trace, blend.layout, end.recomputed)
            self._report(blend.job, blend.stats, end, trace)

    def _prefill(self, job: BlendJob, reason: str = "blending failed, see the log") -> None:
        stats = BlendStats(len(job.token_ids), prefix_tokens=job.hit, missed_tokens=len(job.token_ids) - job.hit)
        stats.decision, stats.reason = "prefill", reason
        started = time.perf_counter()
        try:
            self._forward(job).recompute(torch.arange(job.hit, len(job.token_ids)))
        except Exception as error:
            self._log_fault("prefilling failed too, the prompt is left to vLLM", error)
            self.failed_blocks.update(job.block_ids[job.hit // self._model.kv.block_size :])
        stats.recompute = time.perf_counter() - started
        self._report(job, stats)

    def _forward(self, job: BlendJob) -> PagedForward:
        return PagedForward(self._model, torch.from_numpy(job.token_ids.astype(np.int64)), job.block_ids, job.hit)

    def _read(self, key: str, reads: list[_Read]) -> ChunkKV | None:
        try:
            read = self._meter.read(key)
            if read is None:
                return None
            reads.append(_Read(key, read.tier, read.chunk.nbytes, read.seconds))
            chunk = self._model.own_heads(read.chunk)  # as a memory tier has done
        except Exception as error:  # on one rank, perhaps: all have to go on to where they agree
            self._log_fault("a chunk can't be read", error)
            return None
        self._brought[key] = chunk.nbytes
        if not self._fits(chunk):
            logger.warning("chunk %s is of another model (KV of shape %s): ignored", key, tuple(chunk.kv.shape))
            return None
        return chunk

    def _fits(self, chunk: ChunkKV) -> bool:
        layers, _, _, heads, head_dim = chunk.kv.shape
        kv = self._model.kv
        dtype = stored_dtype(chunk.scope.fingerprint.codec, kv.dtype)
        expected = (len(self._model.layers), kv.num_kv_heads, kv.head_dim, dtype)
        return (layers, heads, head_dim, chunk.kv.dtype) == expected

    def _rematch(self, job: BlendJob, scope: ChunkScope, unreadable: set[str]) -> list[Segment]:
        """Matches without some chunks. All ranks go by the first one's: another may see a store that has moved on.

        What is matched now may begin earlier than what was planned, in blocks that plain requests find.
        """
        matched: list[Segment] = []
        if self._model.is_first_rank:
            try:
                self._library = self._library or ChunkLibrary(self._store, scope)
                found = self._library.match(job.token_ids, unreadable | job.left_out)
                matched = [segment.since(job.salted_from) for segment in found if segment.end > job.salted_from]
            except Exception as error:  # the others wait for an answer
                self._log_fault("the store can't be searched", error)
        segments: list[Segment] = self._model.tp.broadcast_object(matched)
        return segments

    def _save(self, job: SaveJob, scope: ChunkScope) -> int:
        tokens = np.zeros(job.start + len(job.token_ids), np.int64)  # only how many there are counts for reading
        forward = PagedForward(self._model, torch.from_numpy(tokens), job.block_ids, 0)
        kv = forward.read(job.start, len(tokens))
        whole = self._model.gather_heads(kv)  # all ranks take part
        encoded, scales = encode(whole if self._model.is_first_rank else kv, scope.fingerprint.codec)
        chunk = ChunkKV(
            scope.key(job.token_ids), scope, job.token_ids, job.start, encoded.cpu().contiguous(),
            None if scales is None else scales.cpu(),
        )  # fmt: skip
        written = 0
        if self._model.is_first_rank:
            written = self._store.put(chunk)
        elif isinstance(self._store, TieredStore):  # or its first prompt would read it from disk, within a step
            self._store.memory.put(chunk)
        kept = self._store.memory.get(chunk.key) if isinstance(self._store, TieredStore) else None
        if kept is not None:
            self._brought[chunk.key] = kept.nbytes
            if self._model.kernel_passes is not None:  # now, rather than when the first prompt waits for it
                self._model.kernel_passes.stream.pinned.pin(kept)
        return written


def _count_reads(blend: _Blend, on_gpu: Collection[str]) -> None:
    """Count what a prompt read; a chunk that was in memory and on the GPU was taken from there."""
    for read in blend.reads:
        tier: Tier = "gpu" if read.tier == "memory" and read.key in on_gpu else read.tier
        blend.stats.count_read(tier, read.nbytes, read.seconds)
