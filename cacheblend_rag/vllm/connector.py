"""The KV connector that vLLM loads. Every hook goes to one of the two halves, and none lets an exception out.

Usable in process, by hand and served; see ``docs/vllm.md``::

    vllm.LLM(model, kv_transfer_config={"kv_connector": "CacheBlendConnector", "kv_role": "kv_both",
                                        "kv_connector_extra_config": {"store": "chunk-kv"}})
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from cacheblend_rag.chunks import ChunkScope
from cacheblend_rag.errors import ConfigError, UnsupportedModelError
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.logs import LEVEL_VARIABLE, log_to_stderr
from cacheblend_rag.model_profile import read_question_layers
from cacheblend_rag.store import ChunkStore, open_store
from cacheblend_rag.vllm.compat import check_version
from cacheblend_rag.vllm.messages import BlendJob, FoundAtStart, StepJobs, WorkerReports
from cacheblend_rag.vllm.metrics import BlendMetrics, BlendPromMetrics
from cacheblend_rag.vllm.model import PagedModel, find_model
from cacheblend_rag.vllm.probe import measure_blend, measure_prefill, measure_shift, probe, probed_kernel_passes
from cacheblend_rag.vllm.scheduler_half import SchedulerHalf
from cacheblend_rag.vllm.settings import ConnectorSettings
from cacheblend_rag.vllm.support import check_supported
from cacheblend_rag.vllm.worker_half import WorkerHalf

logger = logging.getLogger(__name__)
T = TypeVar("T")


class CacheBlendConnector(KVConnectorBase_V1):
    """CacheBlend as a KV connector of stock vLLM.

    vLLM makes one in the scheduler and one in every worker.

    Attributes:
        faults: Exceptions of our own code that were survived, by hook.

    Raises:
        ConfigError: bad settings.
        UnsupportedModelError: the model can't be blended, unless ``on_unsupported`` is ``"prefill"``.
        StoreError: the chunk store can't be opened.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version()
        if level := os.environ.get(LEVEL_VARIABLE):
            log_to_stderr(level)
        self.faults: Counter[str] = Counter()
        self._settings = ConnectorSettings.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._engine_id: str = vllm_config.kv_transfer_config.engine_id
        if not vllm_config.scheduler_config.async_scheduling:
            # Blocks that could not be filled are recomputed; the scheduler reads this once it has made its connector.
            # With asynchronous scheduling the next step is under way by then and would answer from them: there, a
            # request whose blend and whose prefill by us both fail ends in vLLM's error instead.
            vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
        self._block_size: int = vllm_config.cache_config.block_size
        self._scheduler: SchedulerHalf | None = None
        self._promised: dict[str, BlendJob] = {}  # prompts that the workers are to fill in, by request
        self._worker: WorkerHalf | None = None
        self._found: FoundAtStart | None = None
        self._failed_blocks: set[int] = set()
        self._unsupported = ""
        try:
            check_supported(vllm_config)
        except UnsupportedModelError as error:
            self._give_up(error)
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = self._make_scheduler_half(vllm_config)
            self._scheduler.refusal = self._unsupported

    # In the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """See the base class."""
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        """See the base class."""
        if self._scheduler is not None:
            self._guard("on_new_request", None, self._scheduler.new_request, request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See the base class."""
        if self._scheduler is None:
            return 0, False
        nothing: int | None = 0
        count = self._guard(
            "get_num_new_matched_tokens", nothing, self._scheduler.matched_tokens, request, num_computed_tokens
        )
        return count, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See the base class."""
        if self._scheduler is None:
            return
        block_ids = list(blocks.get_block_ids()[0])
        if num_external_tokens:
            # vLLM counts on what was promised: should the plan get lost now, the prompt is prefilled.
            ids = np.asarray(request.prompt_token_ids, np.int32)
            hit = len(ids) - 1 - num_external_tokens
            self._promised[request.request_id] = BlendJob(
                request.request_id, ids, hit, (), hit, self._settings.blend, frozenset(), "", "", block_ids
            )
        self._guard(
            "update_state_after_alloc", None, self._scheduler.allocated, request, block_ids, num_external_tokens
        )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """See the base class."""
        if self._scheduler is None:
            return KVConnectorMetadata()
        nothing = StepJobs(self._scheduler.scope)
        jobs = self._guard("build_connector_meta", nothing, self._scheduler.build_jobs, scheduler_output)
        if jobs is nothing:  # what was planned is prefilled; the next step has plans of its own
            self._scheduler.forget_jobs()
        planned = {job.request_id for job in jobs.blends}
        jobs.prefills = [job for request_id, job in self._promised.items() if request_id not in planned]
        self._promised.clear()
        return jobs

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """See the base class."""
        if self._scheduler is not None:
            self._scheduler.note_start([found for found in metadata.values() if isinstance(found, FoundAtStart)])

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """See the base class. Which rank of a pipeline tells what does not matter."""
        self.set_xfer_handshake_metadata(dict(enumerate(metadata.values())))

    def update_connector_output(self, connector_output: Any) -> None:
        """See the base class."""
        if self._scheduler is not None:
            self._guard("update_connector_output", None, self._scheduler.step_done)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See the base class."""
        if self._scheduler is None:
            return False, None
        return False, self._guard("request_finished", None, self._scheduler.finished, request)

    # In a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See the base class."""
        if self._unsupported:
            return
        try:
            model = PagedModel(find_model(), self._vllm_config, self._kv_cache_config)
            probe(model)
            shift_errors = measure_shift(model)
            if model.kv.device.type == "cuda":
                model.kernel_passes = probed_kernel_passes(model, self._settings.gpu_bytes, self._settings.codec)
        except UnsupportedModelError as error:
            self._give_up(error)
            return
        self._worker = WorkerHalf(model, self._open_store())
        prefill_seconds = measure_prefill(model)
        blend_seconds = None if prefill_seconds is None else measure_blend(model, prefill_seconds)
        self._found = FoundAtStart("", prefill_seconds, blend_seconds, shift_errors)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """See the base class. What vLLM carries to the scheduler before it serves."""
        return FoundAtStart(self._unsupported) if self._unsupported else self._found

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See the base class."""
        jobs = self._connector_metadata
        if self._worker is not None and isinstance(jobs, StepJobs) and jobs.prefetches:
            self._guard("start_load_kv", None, self._worker.prefetch, jobs.prefetches)
        if not isinstance(jobs, StepJobs) or not jobs.blends + jobs.prefills:
            return
        assert self._worker is not None  # or the scheduler half would have promised nothing
        filled = self._guard("start_load_kv", False, self._worker.run_blends, jobs)
        if not filled:
            everything = jobs.blends + jobs.prefills
            filled = self._guard("start_load_kv", False, self._worker.prefill, everything)
            if not filled:
                self._failed_blocks.update(
                    b for job in everything for b in job.block_ids[job.hit // self._block_size :]
                )

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Blends are complete before the forward pass: there is nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Chunks are stored after the forward pass, when all layers are there."""

    def wait_for_save(self) -> None:
        """See the base class."""
        jobs = self._connector_metadata
        if self._worker is not None and isinstance(jobs, StepJobs) and jobs.saves:
            self._guard("wait_for_save", None, self._worker.run_saves, jobs)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See the base class."""
        failed, self._failed_blocks = self._failed_blocks, set()
        if self._worker is not None:
            failed |= self._worker.failed_blocks
            self._worker.failed_blocks = set()
        return failed

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """See the base class."""
        if self._worker is None:
            return None
        reports, brought, read = self._worker.take_reports(), self._worker.take_brought(), self._worker.take_read()
        if not (reports or brought or read[0]):
            return None
        return WorkerReports(self._engine_id, reports, brought, read)

    # Anywhere

    def shutdown(self) -> None:
        """Close the store."""
        if self._worker is not None:
            self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()
            if self._settings.store is None:
                shutil.rmtree(self._own_directory, ignore_errors=True)

    def get_kv_connector_stats(self) -> Any:
        """See the base class. The scheduler half counts: the workers' reports reach it."""
        if self._scheduler is None or self._scheduler.metrics.is_empty():
            return None
        metrics, self._scheduler.metrics = self._scheduler.metrics, BlendMetrics()
        return metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """See the base class."""
        return BlendMetrics(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        """See the base class."""
        return BlendPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def _make_scheduler_half(self, vllm_config: Any) -> SchedulerHalf:
        # Here: a worker needs none of it.
        from cacheblend_rag.engines.fingerprint import fingerprint_model
        from cacheblend_rag.engines.model_files import load_config, load_tokenizer, resolve_model, tokenize_prompt

        model_config = vllm_config.model_config
        directory = resolve_model(model_config.model, model_config.revision)
        config = load_config(model_config.model, directory)
        tokenizer = load_tokenizer(
            model_config.tokenizer, resolve_model(model_config.tokenizer, model_config.tokenizer_revision)
        )
        fingerprint = fingerprint_model(
            model_config.served_model_name or model_config.model,
            directory,
            config,
            tokenizer,
            str(model_config.dtype).removeprefix("torch."),
            overrides=_overrides(model_config, vllm_config.cache_config.cache_dtype),
        )
        fingerprint = dataclasses.replace(fingerprint, codec=self._settings.codec)
        primer_ids = tokenize_prompt(tokenizer, self._settings.primer).tolist()
        scope = ChunkScope(self._settings.namespace, fingerprint, tuple(primer_ids))
        if len(primer_ids) + 2 > model_config.max_model_len:
            raise ConfigError(f"the primer has {len(primer_ids)} tokens, which leaves no room for chunks: shorten it")
        num_layers = model_config.get_num_layers(vllm_config.parallel_config)
        self._settings.blend.check_layer_numbers(num_layers)
        store = self._open_store()
        # Once, and in one process: the workers get it with each request's settings.
        layers = read_question_layers(store, fingerprint.weights, num_layers)
        blend = self._settings.blend.or_question_layers(layers)
        logger.info(
            "model %s (%s), policy %s, recompute_ratio %s, store %s",
            fingerprint.name,
            fingerprint.dtype,
            blend.policy,
            blend.recompute_ratio,
            store,
        )
        return SchedulerHalf(
            dataclasses.replace(self._settings, blend=blend),
            ChunkLibrary(store, scope),
            bos_token=tokenizer.bos_token,
            special_ids=tokenizer("")["input_ids"],
            num_layers=num_layers,
            context_window=model_config.max_model_len,
            block_size=vllm_config.cache_config.block_size,
            # A quarter of what a step of vLLM's may prefill: whoever is being answered waits no longer for blends.
            step_rows=vllm_config.scheduler_config.max_num_batched_tokens // 4,
            engine_id=self._engine_id,
        )

    def _open_store(self) -> ChunkStore:
        settings = self._settings
        directory = settings.store or self._own_directory
        return open_store(directory, memory_bytes=settings.memory_bytes, max_bytes=settings.max_bytes)

    @property
    def _own_directory(self) -> Path:
        """Where chunks are kept if no store is named: the halves may be in different processes, so not in memory."""
        return Path(tempfile.gettempdir(), f"cacheblend-{self._engine_id}")

    def _give_up(self, error: UnsupportedModelError) -> None:
        if self._settings.on_unsupported == "refuse":
            raise error
        logger.warning("every prompt is prefilled plainly: %s", error)
        self._unsupported = str(error)

    def _guard(self, hook: str, otherwise: T, call: Callable[..., T], *args: Any) -> T:
        """Call a half; whatever goes wrong there is counted, logged once a hook, and the engine goes on without it."""
        try:
            return call(*args)
        except Exception:
            self.faults[hook] += 1
            if self._scheduler is not None:
                self._scheduler.metrics.count("errors")
            log = logger.exception if self.faults[hook] == 1 else logger.debug
            log("CacheBlend failed in %s; the engine goes on without it", hook)
            return otherwise


def _overrides(model_config: Any, cache_dtype: str) -> str:
    """What the command line changes of the model that its files don't tell."""
    overrides = model_config.hf_overrides or {}
    changes = {
        "hf_overrides": overrides,
        "hf_config_path": model_config.hf_config_path,
        "quantization": model_config.quantization,
        "kv_cache_dtype": None if cache_dtype == "auto" else cache_dtype,
    }
    return "" if not any(changes.values()) else repr(changes)
