"""The half of the connector that lives in the scheduler: matches, decides, salts, and answers warm requests.

It sees token ids and block tables, no tensors. A request goes through it like this:

    on_new_request                known chunks are matched; if they pay, later blocks get salted hashes
    get_num_new_matched_tokens    vLLM has looked up its prefix cache: all but the last prompt token is promised
    update_state_after_alloc      blocks are there: the workers get a job, done before this step's forward pass
    request_finished              stats go out with the response
"""

from __future__ import annotations

import dataclasses
import logging
import math
import struct
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

import cacheblend_rag
from cacheblend_rag.budget import Budget, ratios
from cacheblend_rag.chunks import TokenIds
from cacheblend_rag.decision import decide, spared_tokens
from cacheblend_rag.errors import ChunkTooLongError, ConfigError, StoreError
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.matching import Segment
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.vllm.costs import DiskChunk, DiskCosts
from cacheblend_rag.vllm.isolation import BlockHashes, Marks, Salts
from cacheblend_rag.vllm.messages import BlendJob, FoundAtStart, SaveJob, StepJobs, close_box, open_box
from cacheblend_rag.vllm.metrics import BlendMetrics
from cacheblend_rag.vllm.settings import PARAMS_KEY, ConnectorSettings, RequestParams
from cacheblend_rag.vllm.waiting import DiskWait, MemoryTier

logger = logging.getLogger(__name__)

_REMEMBERED = 4096  # finished requests whose stats can be asked for
_TRACES = 16  # and whose traces: these are megabytes
_GOES_ON = "goes on from blended blocks in the prefix cache"
_IDLE_SECONDS = 0.001  # of a step without work, while chunks are read: the reading needs the time


@dataclasses.dataclass
class _Plan:
    """What is known of a request on its way.

    Attributes:
        request: vLLM's.
        params: What it asks for.
        stats: How its prompt is read, as far as the scheduler knows.
        ids: Its prompt.
        segments: Matched runs of it; empty unless it is to be blended.
        layout: Of the prompt behind the hit that was asked for last, until it has blocks.
        hashes: Its block hashes, if it is to be blended.
        marks: Where its blocks are salted; empty unless it is to be blended.
        cached: Tokens that the prefix cache had of it when it was planned.
        wait: What it waits for, if chunks of it are on disk only.
        reason: Why it is read as it was planned.
        left_out: Keys of known chunks that are not used: they are on disk, and reading them takes longer than it saves.
        rows: Most rows that its blend recomputes.
        spoilt: Whether its blended blocks are none that others may read.
        block_ids: Its block table, of a chunk to be stored.
        answer: What a request that asks for something else than generation is told.
        first_token_at: Unix time.
    """

    request: Any
    params: RequestParams
    stats: BlendStats
    ids: TokenIds
    segments: tuple[Segment, ...] = ()
    layout: PromptLayout | None = None
    hashes: BlockHashes | None = None
    marks: Marks = ()
    cached: int = 0
    wait: DiskWait | None = None
    reason: str = ""
    left_out: frozenset[str] = frozenset()
    rows: int = 0
    spoilt: bool = False
    block_ids: list[int] = dataclasses.field(default_factory=list)
    answer: dict[str, Any] | None = None
    first_token_at: float | None = None

    def decide(self, layout: PromptLayout, num_layers: int, overhead: int) -> None:
        """Decide how the prompt is read, and say why in the stats."""
        self.stats.decision, self.stats.reason = decide(layout, self.params.blend, num_layers, overhead)
        if self.left_out:
            slow = f"{len(self.left_out)} known chunks are on disk, where reading takes longer than it saves"
            self.stats.reason = f"{self.stats.reason}; {slow}" if layout.segments else slow
        self.reason = self.stats.reason


class SchedulerHalf:
    """Not safe for several threads: vLLM calls its connectors from one.

    Args:
        settings: The connector's.
        library: The chunks of the engine's scope.
        bos_token: The tokenizer's, or None.
        special_ids: What the tokenizer puts before every text, such as BOS; not part of a chunk.
        num_layers: Layers of the model.
        context_window: Most tokens of a prompt and its answer.
        block_size: Tokens of a block.
        step_rows: Most rows that the blends of one step may recompute together; the first one always may.
        engine_id: vLLM's name of this engine.

    Attributes:
        metrics: Counts since they were last taken.
        scope: Namespace, model and primer.
        refusal: Why nothing can be blended, empty if it can.
        costs: What reading from disk and prefill take.
    """

    def __init__(
        self,
        settings: ConnectorSettings,
        library: ChunkLibrary,
        *,
        bos_token: str | None,
        special_ids: Sequence[int],
        num_layers: int,
        context_window: int,
        block_size: int,
        step_rows: int,
        engine_id: str,
    ) -> None:
        self.metrics = BlendMetrics()
        self.refusal = ""
        self.costs = DiskCosts()
        self._settings = settings
        self.scope = library.scope
        self._library = library
        self._bos_token = bos_token
        self._special_ids = list(special_ids)
        self._primer_ids = np.asarray(library.scope.primer_ids, np.int32)
        self._num_layers = num_layers
        self._overhead = 0  # see decide()
        self._shift_errors: list[float] = []  # see FoundAtStart
        self._context_window = context_window
        self._block_size = block_size
        self._step_rows = step_rows
        self._planned_rows = 0  # in this step
        self._filling: set[bytes] = set()  # hashes of the blocks that this step's blends fill
        self._engine_id = engine_id
        self._box = open_box(engine_id)
        self._memory = MemoryTier(settings.memory_bytes)
        self._block_pool: Any = None
        self._salts = Salts(library.scope, block_size)
        self._plans: dict[str, _Plan] = {}
        self._jobs = StepJobs(library.scope)
        self._finished: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._traces: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def bind_block_pool(self, block_pool: Any) -> None:
        """VLLM's pool of blocks, asked which are cached."""
        self._block_pool = block_pool

    def note_start(self, found: Sequence[FoundAtStart]) -> None:
        """What each worker has found out of the loaded model: a step takes as long as the slowest one."""
        self.refusal = next((one.refusal for one in found if one.refusal), self.refusal)
        prefill = max((one.prefill_seconds for one in found if one.prefill_seconds is not None), default=None)
        blend = max((one.blend_seconds for one in found if one.blend_seconds is not None), default=None)
        self.costs.prefill = prefill
        self._shift_errors = [max(of_ranks) for of_ranks in zip(*(one.shift_errors for one in found), strict=False)]
        self._overhead = 0 if prefill is None or blend is None else math.ceil(blend / prefill)

    def new_request(self, request: Any) -> None:
        """See the module."""
        started = time.perf_counter()
        ids = _as_ids(request.prompt_token_ids or [])
        stats = BlendStats(request.num_prompt_tokens, reason="planning failed, see the log")
        plan = _Plan(request, RequestParams(blend=self._settings.blend), stats, ids)
        self._plans[request.request_id] = plan
        try:
            plan.params = RequestParams.parse(request.kv_transfer_params, self._settings.blend, self._num_layers)
        except ConfigError as error:
            plan.stats.reason = f"bad kv_transfer_params: {error}"
            self.metrics.count("errors")
            return
        if plan.params.action == "generate":
            self._plan_generation(plan)
        elif _obstacle(request):
            plan.answer = {"error": f"bad request: {_obstacle(request)}"}
        elif self.refusal and plan.params.action in ("warm", "evict"):
            # Served plainly on purpose: nothing to store, and no reason to stop an ingestion.
            plan.answer = {
                "stored": 0,
                "already_there": 0,
                "tokens": 0,
                "bytes": 0,
                "evicted": 0,
                "reason": self.refusal,
            }
            _replace_prompt(request, plan.ids[:1])
        else:
            try:
                self._answer(plan)
            except StoreError as error:
                self.metrics.count("errors")
                plan.answer = {"error": str(error), "kind": StoreError.__name__}
                _replace_prompt(request, plan.ids[:1])
        plan.stats.match = time.perf_counter() - started

    def matched_tokens(self, request: Any, hit: int) -> int | None:
        """How many tokens after the ``hit`` first ones the workers will fill in; None: ask again in the next step."""
        plan = self._plans.get(request.request_id)
        if plan is None:  # its arrival failed
            return 0
        # A request that comes back after a preemption may hit what it has generated, too.
        plan.stats.prefix_tokens = min(hit, request.num_prompt_tokens)
        plan.stats.missed_tokens = request.num_prompt_tokens - plan.stats.prefix_tokens
        if not plan.segments:
            if hit and plan.params.action == "generate":
                plan.stats.decision = "prefix"
            return 0
        assert plan.hashes is not None
        layout = plan.layout
        if layout is None or layout.prefix != hit:
            plan.layout = layout = PromptLayout.after_hit(plan.ids, plan.segments, self._primer_ids, hit)
        # Whatever has been evicted since it was planned: plain KV must not get into blocks with blended ones' names.
        plan.stats.decision, plan.stats.reason = "blend", plan.reason
        if hit > plan.marks[0][0] * self._block_size:
            plan.stats.decision = "blend" if layout.segments else "prefix"
            plan.stats.reason = _GOES_ON
        if plan.stats.decision != "blend":
            return 0
        if self._is_held_by_disk(plan, hit):
            return None
        if not self._computed(request.block_hashes[: hit // self._block_size]):
            return None
        plan.rows = Budget.of(len(layout.matched), plan.params.blend).ceiling + len(layout.missed)
        if self._jobs.blends and self._planned_rows + plan.rows > self._step_rows:
            return None  # requests that are being answered wait for the step to end
        first_block = _first_loaded(layout) // self._block_size
        if first_block < plan.marks[0][0]:  # exact blocks that were to be read have been evicted meanwhile
            plan.marks = ((first_block, plan.marks[0][1]),)
            plan.hashes.salt(plan.marks)
        return len(plan.ids) - 1 - hit

    def _is_held_by_disk(self, plan: _Plan, hit: int) -> bool:
        """Whether a request has to be asked for again: it waits for chunks, or has just given some up."""
        self._note_brought()
        if hit < plan.cached:  # blocks have been evicted meanwhile
            plan.cached = hit
            self._wait_for_disk(plan, plan.segments)
        if plan.wait is None or not plan.wait.missing:
            return False
        prefill = self.costs.prefill
        if plan.params.blend.mode != "auto" or prefill is None or plan.block_ids:  # once begun, it goes on as planned
            return not plan.wait.is_over
        # What came while a long step ran is not known before its end.
        if not plan.wait.is_over and self.costs.heard_at - plan.wait.began <= plan.wait.spared * prefill:
            return True
        self.metrics.count("slow_chunks", len(plan.wait.missing))
        plan.left_out |= plan.wait.missing
        self._plan_blends(plan)
        return True  # what it hits under its new hashes is for vLLM to say

    def _computed(self, hit_hashes: Sequence[bytes]) -> bool:
        """Whether blocks that were hit have been computed before this step.

        vLLM registers blocks when it allocates them. A forward pass may read what it computes itself, but blends come
        before it, and side by side: they must not read blocks that are computed or blended in the same step.
        """
        if not hit_hashes:
            return True
        if not self._filling.isdisjoint(hit_hashes):
            return False
        coming = {
            block_hash
            for plan in self._plans.values()
            if plan.request.status.name == "RUNNING"
            for block_hash in plan.request.block_hashes[plan.request.num_computed_tokens // self._block_size :]
        }
        return coming.isdisjoint(hit_hashes)

    def _note_brought(self) -> None:
        """Chunks have come to memory, which requests may be waiting for."""
        while self._box.brought:
            key, nbytes = self._box.brought.popitem()
            self.costs.note_come(key)
            self._memory.add(key, nbytes)
            for plan in self._plans.values():
                if plan.wait is not None:
                    plan.wait.missing.discard(key)
        for tokens, seconds in self._box.read:
            self.costs.note_read(tokens, seconds)
        self._box.read.clear()

    def allocated(self, request: Any, block_ids: list[int], filled_in: int) -> None:
        """The request has blocks; ``filled_in`` tokens are for the workers to fill in."""
        plan = self._plans.get(request.request_id)
        if plan is None:
            return
        plan.block_ids = block_ids
        plan.layout = None
        if filled_in:
            hit = len(plan.ids) - 1 - filled_in
            self._planned_rows += plan.rows
            self._filling.update(request.block_hashes[hit // self._block_size :])
            self._jobs.blends.append(
                BlendJob(
                    request.request_id,
                    plan.ids,
                    hit,
                    plan.segments,
                    plan.marks[0][0] * self._block_size,
                    plan.params.blend,
                    plan.left_out,
                    plan.stats.reason,
                    plan.marks[-1][1],
                    block_ids,
                    plan.params.trace,
                    self._overhead,
                )
            )

    def build_jobs(self, scheduler_output: Any) -> StepJobs:
        """What the workers have to do in this step."""
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            plan = self._plans.get(request_id)
            if plan is None or plan.params.action != "warm" or block_ids is None:
                continue
            if request_id not in cached.resumed_req_ids:  # those have come by way of allocated()
                plan.block_ids.extend(block_ids[0])
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            plan = self._plans.get(request_id)
            if plan is None or plan.params.action != "warm" or plan.answer is not None:
                continue
            if plan.request.num_computed_tokens + tokens >= len(plan.ids):
                start = len(self._primer_ids)
                self._jobs.saves.append(SaveJob(request_id, plan.ids[start:], start, list(plan.block_ids)))
        waits = (plan.wait for plan in self._plans.values() if plan.wait is not None)
        if not scheduler_output.num_scheduled_tokens and any(wait.missing for wait in waits):
            time.sleep(_IDLE_SECONDS)
            self.costs.note_heard()  # nobody tells that nothing has come
        jobs = self._jobs
        self.forget_jobs()
        return jobs

    def forget_jobs(self) -> None:
        """Begin the next step."""
        self._jobs = StepJobs(self.scope)
        self._planned_rows = 0
        self._filling.clear()

    def step_done(self) -> None:
        """A step's output has been processed."""
        self._note_brought()
        self.costs.note_heard()
        now = time.time()
        for plan in self._plans.values():
            if plan.first_token_at is None and plan.request.num_output_tokens:
                plan.first_token_at = now
        for request_id in self._box.reports.keys() - self._plans.keys():
            del self._box.reports[request_id]  # of requests that were aborted
        for request_id, report in self._box.reports.items():
            self._renew_if_wrong(self._plans[request_id], report)

    def finished(self, request: Any) -> dict[str, Any] | None:
        """What goes out with the response, for ``kv_transfer_params``."""
        plan = self._plans.pop(request.request_id, None)
        if plan is None:
            return None
        report = self._box.reports.pop(request.request_id, None)
        if plan.params.action != "generate":
            ours = plan.answer if plan.answer is not None else self._warm_answer(plan, report)
        else:
            told = report or {}
            trace, scores = told.pop("trace", None), told.pop("score_range", ())
            stats = self._stats(plan, report)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("%s: %s", request.request_id, stats.line(scores))
            ours = stats.to_dict()
            if plan.params.request_id is not None:
                _remember(self._finished, plan.params.request_id, ours, _REMEMBERED)
                if trace is not None:
                    _remember(self._traces, plan.params.request_id, trace, _TRACES)
            if trace is not None:
                ours = {**ours, "trace": trace}
        return {PARAMS_KEY: ours}

    def close(self) -> None:
        """Close the store."""
        self._library.store.close()
        close_box(self._engine_id)

    def _plan_generation(self, plan: _Plan) -> None:
        request, config = plan.request, plan.params.blend
        obstacle = self.refusal or _obstacle(request)
        if config.mode == "off":
            plan.stats.reason = "mode is off"
        elif obstacle:
            plan.stats.reason = obstacle
        else:
            hit = self._cached_tokens(request)
            most = len(plan.ids) - 1 - hit
            if config.mode == "auto" and most < config.min_reused_tokens:
                plan.stats.reason = f"{most} tokens could be reused, min_reused_tokens is {config.min_reused_tokens}"
                return
            self._note_brought()
            if config.mode == "auto":
                plan.left_out = self._salts.left_out_before(plan.ids, request.block_hashes, config)
            self._plan_blends(plan)

    def _plan_blends(self, plan: _Plan) -> None:
        """Plan how a prompt is read if it is blended, where that pays, without chunks that are too slow."""
        plan.segments, plan.wait = (), None
        before = plan.left_out
        try:
            if plan.hashes is not None:
                plan.hashes.salt(())
            hit = self._cached_tokens(plan.request)
            while slow := self._plan_blend(plan, hit):
                plan.left_out |= slow
        except BaseException:
            if plan.hashes is not None:
                plan.hashes.salt(())
            raise
        if left_out := plan.left_out - before:
            self.metrics.count("slow_chunks", len(left_out))
            if not self.costs.wait:  # the disk has nothing else to do: for whoever asks next
                self._fetch(sorted(left_out) if self._settings.memory_bytes else [min(left_out)])

    def _plan_blend(self, plan: _Plan, hit: int) -> set[str]:
        """Plan how a prompt is read with the chunks that are not left out.

        Args:
            plan: The request's; chunks that it leaves out are treated as not warm.
            hit: Tokens whose exact KV is in the prefix cache.

        Returns:
            Keys of chunks to leave out as well. The plan is to be made again then.
        """
        request, config = plan.request, plan.params.blend
        segments = self._library.match(plan.ids, plan.left_out)
        if config.mode == "blend" and segments:
            hit = min(hit, segments[0].start)  # blend also what could be had from the prefix cache
        layout = PromptLayout.after_hit(plan.ids, segments, self._primer_ids, hit)
        plan.decide(layout, self._num_layers, self._overhead)
        if not layout.segments:
            return self._leave_plain(plan)
        plain = plan.hashes.plain if plan.hashes is not None else request.block_hashes
        if plan.stats.decision != "blend" and not self._salts.may_go_on(plan.ids, plain, config):
            return self._leave_plain(plan)
        plan.hashes = plan.hashes or BlockHashes(request)
        first_block = _first_loaded(layout) // self._block_size
        chosen_from = plan.ids, plan.hashes.plain, segments, config, first_block
        plan.marks = self._salts.choose(*chosen_from)
        plan.hashes.salt(plan.marks)
        cached = self._cached_tokens(request)
        is_coming = any(one is not plan and one.marks[:1] == plan.marks[:1] for one in self._plans.values())
        if cached < hit or (cached <= plan.marks[0][0] * self._block_size and not is_coming):
            # No blended blocks of an earlier prompt are left to go on from, or exact ones reach further. Under its
            # salts, it would find what is blended for this one.
            plan.marks = self._salts.choose(*chosen_from, alone=True)
            plan.hashes.salt(plan.marks)
            cached = self._cached_tokens(request)
        plan.cached = cached
        if cached > plan.marks[0][0] * self._block_size:
            # However little is left: read otherwise than the first time, the same prompt would get another answer.
            plan.stats.decision, plan.reason = "blend", _GOES_ON
        if plan.stats.decision != "blend":
            return self._leave_plain(plan)
        lost = max(cached - hit, 0)  # blended tokens that are found under these salts only
        on_disk = self._on_disk(plan, segments) if config.mode == "auto" else []
        if on_disk and (slow := self.costs.too_slow(on_disk, lost, self._gain(plan, segments, lost))):
            return slow
        self._wait_for_disk(plan, segments, lost)
        self._salts.remember(plan.ids, plan.hashes.plain, segments, config, plan.left_out, plan.marks)
        plan.layout = layout
        plan.segments = tuple(segments)  # last: nothing is blended unless it is kept apart
        return set()

    def _leave_plain(self, plan: _Plan) -> set[str]:
        """A plan that is not to blend after all; returns what :meth:`_plan_blend` does then."""
        plan.marks = ()
        if plan.hashes is not None:
            plan.hashes.salt(())  # as they were
        return set()

    def _on_disk(self, plan: _Plan, segments: Sequence[Segment]) -> list[DiskChunk]:
        """The chunks of some runs that are neither in the prefix cache nor in memory."""
        reused = 1 - ratios(plan.params.blend)[1]
        spared: dict[str, float] = {}
        for segment in segments:
            if segment.end > plan.cached:
                spared[segment.key] = spared.get(segment.key, 0.0) + segment.since(plan.cached).length * reused
        # Without memory, all are: steps read them.
        missing = self._memory.missing(spared) if self._settings.memory_bytes else spared
        return [
            DiskChunk(key, 0 if self.costs.is_coming(key) else self._tokens_of(key), spared[key]) for key in missing
        ]

    def _gain(self, plan: _Plan, segments: Sequence[Segment], lost: int) -> float:
        """How many tokens could be prefilled in the time that blending a prompt saves if all its chunks are there.

        Args:
            plan: The request's, in mode ``"auto"``.
            segments: Matched runs of the whole prompt.
            lost: Tokens of it that are in the prefix cache only as it is to be blended.
        """
        layout = PromptLayout.after_hit(plan.ids, segments, self._primer_ids, plan.cached)
        return max(lost + spared_tokens(layout, plan.params.blend, self._num_layers) - self._overhead, 0)

    def _wait_for_disk(self, plan: _Plan, segments: Sequence[Segment], lost: int = 0) -> None:
        """Let a request wait for what of it is on disk, or else lose so many tokens that are in the prefix cache."""
        chunks = self._on_disk(plan, segments) if self._settings.memory_bytes else []
        if chunks:
            keys = [chunk.key for chunk in chunks]
            self._fetch(keys)
            spared = sum(chunk.spared for chunk in chunks) + lost
            if plan.params.blend.mode == "auto":
                spared = min(spared, self._gain(plan, segments, lost))
            plan.wait = DiskWait(set(keys), spared)

    def _fetch(self, keys: Sequence[str]) -> None:
        """Have chunks brought from disk to the workers' memory."""
        self._jobs.prefetches.extend(keys)
        for key in self._memory.missing(dict.fromkeys(keys)):
            self.costs.note_asked(key, self._tokens_of(key))

    def _tokens_of(self, key: str) -> int:
        ids = self._library.store.ids(key)
        return 0 if ids is None else len(ids)

    def _cached_tokens(self, request: Any) -> int:
        """Leading tokens of the prompt that the prefix cache has. The last one is never among them."""
        blocks = 0
        for block_hash in request.block_hashes[: (request.num_prompt_tokens - 1) // self._block_size]:
            if self._block_pool is None or not self._block_pool.get_cached_block(block_hash, [0]):
                break
            blocks += 1
        return blocks * self._block_size

    def _answer(self, plan: _Plan) -> None:
        """Prepare a request that asks for something else than generation: it generates one token that nobody reads."""
        chunk = plan.ids
        if chunk[: len(self._special_ids)].tolist() == self._special_ids:
            chunk = chunk[len(self._special_ids) :]
        action, prompt = plan.params.action, plan.ids[:1]
        if action == "describe":
            plan.answer = self._describe()
        elif action == "report":
            request_id = plan.params.request_id or ""
            known = self._finished.get(request_id)
            if known is not None and (trace := self._traces.pop(request_id, None)) is not None:
                known = {**known, "trace": trace}
            plan.answer = known or {"error": f"no request {plan.params.request_id!r} has finished here lately"}
        elif action in ("lookup", "list_keys", "evict_keys", "prefetch"):
            plan.answer = self._answer_by_key(plan.params)
        elif action == "evict":
            plan.answer = {"evicted": int(self._library.evict(chunk))}
        elif self._library.is_warm(chunk) or not len(chunk):
            plan.answer = {"stored": 0, "already_there": 1, "tokens": 0, "bytes": 0}
        elif len(chunk) > self._chunk_room:
            plan.answer = {
                "error": f"the chunk has {len(chunk)} tokens, but only {self._chunk_room} fit the model's "
                "context behind the primer: split it into smaller chunks",
                "kind": ChunkTooLongError.__name__,
            }
        else:
            prompt = np.concatenate([self._primer_ids, chunk])
        plan.ids = prompt
        _replace_prompt(plan.request, prompt)

    def _answer_by_key(self, params: RequestParams) -> dict[str, Any]:
        if params.action == "list_keys":
            cursor, some = self._library.keys_since(params.cursor)
            return {"keys": some, "cursor": cursor}
        if params.action == "evict_keys":
            return {"evicted": sum(map(self._library.evict_key, params.keys))}
        held = list(filter(self._library.holds, params.keys))
        if params.action == "lookup":
            return {"held": held}
        self._fetch(held)
        return {"prefetched": len(held)}

    @property
    def _chunk_room(self) -> int:
        return self._context_window - len(self._primer_ids) - 1

    def _describe(self) -> dict[str, Any]:
        scope = self.scope
        return {
            "version": cacheblend_rag.__version__,
            "namespace": scope.namespace,
            "fingerprint": dataclasses.asdict(scope.fingerprint),
            "bos_token": self._bos_token,
            "primer_ids": list(scope.primer_ids),
            "num_layers": self._num_layers,
            "context_window": self._context_window,
            "blend": self._settings.to_extra_config()["blend"],
            "shift_errors": self._shift_errors,
        }

    def _warm_answer(self, plan: _Plan, report: dict[str, Any] | None) -> dict[str, Any]:
        if report is None:
            return {"error": "the chunk was not stored: the request ended early, or see the engine's log"}
        if "error" in report:
            self.metrics.count("errors")
            return {"error": report["error"], "kind": "StoreError"}
        stored = int(report["bytes"] > 0)
        tokens = len(plan.ids) - len(self._primer_ids)
        self.metrics.count("warmed_chunks", stored)
        return {"stored": stored, "already_there": 1 - stored, "tokens": tokens * stored, "bytes": report["bytes"]}

    def _stats(self, plan: _Plan, report: dict[str, Any] | None) -> BlendStats:
        stats = plan.stats
        answered = plan.request.num_output_tokens > 0
        first_token_at = plan.first_token_at or time.time()
        if report is not None:
            told = {name: value for name, value in report.items() if name != "finished_at"}
            stats = BlendStats(**{**told, "match": stats.match})
            stats.first_token = max(0.0, first_token_at - report["finished_at"])
            self._renew_if_wrong(plan, report)
            self.metrics.count("chunk_faults", stats.faults)
            self.metrics.count("blend_faults", int(stats.decision == "prefill" and stats.faults == 0))
        elif stats.decision == "blend" and answered:  # promised, but a hook failed on the way
            stats.decision, stats.reason = "prefill", "blending failed, see the log"
            self._salts.renew()
            self.metrics.count("blend_faults")
        if answered:
            stats.started = plan.request.arrival_time
            stats.ttft = first_token_at - stats.started
            if not plan.params.uncounted:
                self.metrics.observe(stats)
        return stats

    def _renew_if_wrong(self, plan: _Plan, report: dict[str, Any]) -> None:
        """Let nobody find blocks that hold something else than their salt stands for."""
        wrong = plan.marks and (report["faults"] or report["decision"] != "blend")
        if wrong and not plan.spoilt:
            plan.spoilt = True
            self._salts.renew()


def _first_loaded(layout: PromptLayout) -> int:
    """The first position whose KV comes from a chunk."""
    return (layout.prefix_segments + layout.segments)[0].start


def _obstacle(request: Any) -> str | None:
    """Why this one request can't be blended, or None."""
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return "the prompt is not made of token ids"
    if request.pooling_params is not None:
        return "nothing is generated"
    if request.mm_features:
        return "the prompt holds images or audio"
    if request.lora_request is not None:
        return "the request uses LoRA"
    if request.skip_reading_prefix_cache:
        return "the request skips the prefix cache (prompt_logprobs does that)"
    return None


def _as_ids(token_ids: Sequence[int]) -> TokenIds:
    """What ``np.asarray`` makes of a list, in a third of the time."""
    return np.frombuffer(bytearray(struct.pack(f"{len(token_ids)}i", *token_ids)), np.int32)


def _remember(known: OrderedDict[str, dict[str, Any]], name: str, what: dict[str, Any], most: int) -> None:
    known[name] = what
    if len(known) > most:
        known.popitem(last=False)


def _replace_prompt(request: Any, ids: TokenIds) -> None:
    """Give a request that has not been scheduled yet another prompt, and one token to generate."""
    request.prompt_token_ids = ids.tolist()
    request._all_token_ids[:] = request.prompt_token_ids
    request.num_prompt_tokens = len(ids)
    request.max_tokens = 1
    request.sampling_params.min_tokens = 0
    del request.block_hashes[:]
    request.update_block_hashes()
