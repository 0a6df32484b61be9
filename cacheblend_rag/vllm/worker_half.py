"""The half of the connector that lives in every worker: blends prompts and stores chunks, with the model at hand."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cacheblend_rag.blending import BlendResult, blend
from cacheblend_rag.chunks import ChunkKV, ChunkScope
from cacheblend_rag.decision import decide
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.matching import Segment
from cacheblend_rag.prefetching import Prefetcher
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.store import ChunkStore
from cacheblend_rag.vllm.forward import PagedForward
from cacheblend_rag.vllm.messages import BlendJob, SaveJob, StepJobs
from cacheblend_rag.vllm.model import PagedModel

logger = logging.getLogger(__name__)

_REMEMBERED = 1024  # choices: for 32k tokens, a megabyte each with hkvd, a tenth of it with query_aware


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
        self._choices = _Choices()
        self._library: ChunkLibrary | None = None
        self._logged: set[str] = set()
        self._prefetcher = Prefetcher(self._bring, batch=1)

    def prefetch(self, keys: Sequence[str]) -> None:
        """Begin to bring chunks from disk to memory; the step does not wait for it."""
        self._prefetcher.add(keys)

    @torch.inference_mode()
    def run_blends(self, jobs: StepJobs) -> bool:
        """Fill the blocks of this step's prompts up to their last token. Whatever goes wrong ends in plain prefill.

        Returns:
            True: every block is filled, or among the failed ones.
        """
        for job in jobs.blends:
            try:
                self._report(job, *self._blend(job, jobs.scope))
            except Exception:
                self._log_fault("blending failed, the prompt is prefilled plainly")
                self._prefill(job)
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
                self._log_fault("a chunk could not be stored")
                report = {"error": str(error) or repr(error)}
            if self._model.is_first_rank:  # it alone writes chunks
                self._reports[job.request_id] = functools.partial(dict, report)

    def take_reports(self) -> dict[str, dict[str, Any]]:
        """What became of each job since this was last called, by request id; waits for the blends to end."""
        reports, self._reports = self._reports, {}
        return {request_id: report() for request_id, report in reports.items()}

    def _report(self, job: BlendJob, stats: BlendStats, result: BlendResult | None = None) -> None:
        def report() -> dict[str, Any]:
            if result is not None:
                stats.select, stats.recompute = result.select_seconds, result.recompute_seconds
            return {**stats.to_dict(), "finished_at": time.time()}

        if self._model.is_first_rank:  # all do alike
            self._reports[job.request_id] = report

    def _log_fault(self, what: str) -> None:
        """Log the exception at hand, the first time; the metrics count them all."""
        log = logger.debug if what in self._logged else logger.exception
        self._logged.add(what)
        log(what, exc_info=True)

    def close(self) -> None:
        """Close the store, and let go of what is on the GPU."""
        self._prefetcher.close()
        self._model.kernel_passes = None
        self._store.close()

    def _bring(self, keys: list[str]) -> None:
        for key in keys:
            self._store.prefetch(key)
            if self._model.kernel_passes is not None and (chunk := self._store.get(key)) is not None:
                self._model.kernel_passes.stream.pinned.pin(chunk)

    def _blend(self, job: BlendJob, scope: ChunkScope) -> tuple[BlendStats, BlendResult]:
        stats = BlendStats(len(job.token_ids), decision="blend", reason=job.reason)
        started = time.perf_counter()
        primer_ids = np.asarray(scope.primer_ids, np.int32)
        layout = PromptLayout.after_hit(job.token_ids, job.segments, primer_ids, job.hit)
        forward = self._forward(job)
        unreadable: set[str] = set()
        while lost := self._load(forward, layout):
            # As if these chunks were not warm: others may cover their tokens.
            unreadable |= lost
            segments = self._rematch(job, scope, unreadable)
            layout = PromptLayout.after_hit(job.token_ids, segments, primer_ids, job.hit)
            stats.decision, stats.reason = decide(layout, job.config)
            if stats.decision != "blend":
                layout = PromptLayout.build(len(job.token_ids), prefix=job.hit)
        stats.load = time.perf_counter() - started
        chosen = None if unreadable else self._choices.repeat(job, layout.matched, forward)
        result = blend(forward, layout, job.config, chosen)
        if self._model.kernel_passes is not None:  # nothing that comes after asks layer by layer
            self._model.kernel_passes.stream.wait_for_all()
        if chosen is None and not unreadable:
            self._choices.add(job, layout.matched, result.recomputed, forward)
        stats.prefix_tokens = layout.prefix + sum(segment.length for segment in layout.prefix_segments)
        stats.recomputed_tokens = len(result.recomputed)
        stats.reused_tokens = len(layout.matched) - len(result.recomputed)
        stats.missed_tokens = len(layout.missed)
        stats.segments = len(layout.segments) + len(layout.prefix_segments)
        stats.policy = result.policy
        stats.faults = len(unreadable)
        return stats, result

    def _prefill(self, job: BlendJob) -> None:
        stats = BlendStats(len(job.token_ids), prefix_tokens=job.hit, missed_tokens=len(job.token_ids) - job.hit)
        stats.decision, stats.reason = "prefill", "blending failed, see the log"
        started = time.perf_counter()
        try:
            self._forward(job).recompute(torch.arange(job.hit, len(job.token_ids)))
        except Exception:
            self._log_fault("prefilling failed too, the prompt is left to vLLM")
            self.failed_blocks.update(job.block_ids[job.hit // self._model.kv.block_size :])
        stats.recompute = time.perf_counter() - started
        self._report(job, stats)

    def _forward(self, job: BlendJob) -> PagedForward:
        return PagedForward(self._model, torch.from_numpy(job.token_ids.astype(np.int64)), job.block_ids, job.hit)

    def _load(self, forward: PagedForward, layout: PromptLayout) -> set[str]:
        """Put cached KV in place; returns the keys of chunks that can't be read, and then nothing was put in place."""
        segments = layout.prefix_segments + layout.segments
        pieces = [(self._read(segment.key), segment) for segment in segments]
        lost = self._model.agree([chunk is None for chunk, _ in pieces])
        if any(lost):
            return {segment.key for segment, gone in zip(segments, lost, strict=True) if gone}
        failed = False
        try:
            if pieces:
                forward.place([(chunk, segment) for chunk, segment in pieces if chunk is not None])
        except Exception:  # on one rank, perhaps, for want of memory: the others must not go on alone
            self._log_fault("cached KV could not be put in place")
            failed = True
        if any(self._model.agree([failed])):
            raise RuntimeError("cached KV could not be put in place")
        return set()

    def _read(self, key: str) -> ChunkKV | None:
        try:
            chunk = self._store.get(key)
        except Exception:  # on one rank, perhaps: all have to go on to where they agree
            self._log_fault("a chunk can't be read")
            return None
        if chunk is not None and not self._fits(chunk):
            logger.warning("chunk %s is of another model (KV of shape %s): ignored", key, tuple(chunk.kv.shape))
            return None
        return chunk

    def _fits(self, chunk: ChunkKV) -> bool:
        layers, _, _, heads, head_dim = chunk.kv.shape
        kv = self._model.kv
        expected = (len(self._model.layers), self._model.total_kv_heads, kv.head_dim, kv.dtype)
        return (layers, heads, head_dim, chunk.kv.dtype) == expected

    def _rematch(self, job: BlendJob, scope: ChunkScope, unreadable: set[str]) -> list[Segment]:
        """Matches without some chunks. All ranks go by the first one's: another may see a store that has moved on.

        What is matched now may begin earlier than what was planned, in blocks that plain requests find.
        """
        matched: list[Segment] = []
        if self._model.is_first_rank:
            try:
                self._library = self._library or ChunkLibrary(self._store, scope)
                found = self._library.match(job.token_ids, unreadable)
                matched = [segment.since(job.salted_from) for segment in found if segment.end > job.salted_from]
            except Exception:  # the others wait for an answer
                self._log_fault("the store can't be searched")
        segments: list[Segment] = self._model.tp.broadcast_object(matched)
        return segments

    def _save(self, job: SaveJob, scope: ChunkScope) -> int:
        tokens = np.zeros(job.start + len(job.token_ids), np.int64)  # only how many there are counts for reading
        forward = PagedForward(self._model, torch.from_numpy(tokens), job.block_ids, 0)
        kv = self._model.gather_heads(forward.read(job.start, len(tokens)))
        if not self._model.is_first_rank:
            return 0
        chunk = ChunkKV(scope.key(job.token_ids), scope, job.token_ids, job.start, kv.cpu().contiguous())
        written = self._store.put(chunk)
        if self._model.kernel_passes is not None:  # now, rather than when the first prompt waits for it
            self._model.kernel_passes.stream.pinned.pin(chunk)
        return written
