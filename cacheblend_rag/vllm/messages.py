"""What the two halves of the connector tell each other."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from cacheblend_rag.chunks import ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.matching import Segment


@dataclasses.dataclass(frozen=True)
class BlendJob:
    """One prompt to blend before this step's forward pass.

    Attributes:
        request_id: vLLM's.
        token_ids: The prompt, int32 ``[tokens]``.
        hit: Tokens whose KV vLLM took from its prefix cache; their blocks are shared and must not be written.
        segments: Matched runs of the whole prompt.
        salted_from: Position from which on the prompt's blocks are hidden from others: none before may be blended.
        config: The request's settings.
        left_out: Keys of chunks that are known and not used: they are on disk, and reading takes longer than it saves.
        reason: Why it is blended.
        salt: Names the prompt cache's blended blocks that the hit may hold.
        block_ids: The request's block table.
        trace: Whether to report what the blend measures and chooses.
        overhead: See :func:`decide`, should chunks turn out to be lost.
    """

    request_id: str
    token_ids: TokenIds
    hit: int
    segments: tuple[Segment, ...]
    salted_from: int
    config: BlendConfig
    left_out: frozenset[str]
    reason: str
    salt: str
    block_ids: list[int]
    trace: bool = False
    overhead: int = 0


@dataclasses.dataclass(frozen=True)
class SaveJob:
    """One chunk whose KV is complete after this step's forward pass.

    Attributes:
        request_id: vLLM's.
        token_ids: The chunk, int32 ``[tokens]``.
        start: Position of its first token: the length of the primer.
        block_ids: The request's block table.
    """

    request_id: str
    token_ids: TokenIds
    start: int
    block_ids: list[int]


@dataclasses.dataclass
class StepJobs(KVConnectorMetadata):
    """Everything the workers have to do in one step.

    Attributes:
        scope: Whose chunks they are.
        blends: Prompts to blend.
        saves: Chunks to store.
        prefills: Prompts that were promised, and could not be planned after all: to be prefilled plainly.
        prefetches: Keys of chunks to bring from disk to memory.
    """

    scope: ChunkScope
    blends: list[BlendJob] = dataclasses.field(default_factory=list)
    saves: list[SaveJob] = dataclasses.field(default_factory=list)
    prefills: list[BlendJob] = dataclasses.field(default_factory=list)
    prefetches: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Box:
    """What workers have told and the scheduler half has not looked at yet.

    Attributes:
        reports: By request id.
        brought: Bytes of chunks that are in memory now, by key.
        read: Tokens of chunks that were read from disk, and seconds that it took.
    """

    reports: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    brought: dict[str, int] = dataclasses.field(default_factory=dict)
    read: list[tuple[int, float]] = dataclasses.field(default_factory=list)


class WorkerReports(KVConnectorWorkerMetadata):
    """What a worker found out in one step, on its way to the scheduler half of the same engine.

    vLLM hands worker metadata to the scheduler half only after it has finished the requests of the step, too late for
    the response of a request whose first token is its last. So reports are put into a box as soon as they are in the
    scheduler's process: where they are made, if the worker lives there too, or where they are unpickled.

    Args:
        engine_id: vLLM's name of the engine.
        reports: By request id.
        brought: Bytes of chunks that have been brought to memory, by key.
        read: Tokens of chunks that were read from disk, and seconds that it took; (0, 0.0) if none were.
    """

    def __init__(
        self,
        engine_id: str,
        reports: dict[str, dict[str, Any]],
        brought: dict[str, int],
        read: tuple[int, float],
    ) -> None:
        self._told = engine_id, reports, brought, read
        box = _boxes.get(engine_id)
        if box is not None:
            box.reports.update(reports)
            box.brought.update(brought)
            if read[0]:
                box.read.append(read)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerReports, self._told

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """All ranks do the same: any one's reports will do."""
        return self


_boxes: dict[str, Box] = {}


def open_box(engine_id: str) -> Box:
    """The box of an engine whose scheduler half lives in this process."""
    return _boxes.setdefault(engine_id, Box())


def close_box(engine_id: str) -> None:
    """Forget an engine's box."""
    _boxes.pop(engine_id, None)


@dataclasses.dataclass
class FoundAtStart(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler half of the loaded model before anything is served.

    Attributes:
        refusal: Why it can't be blended; empty if it can.
        prefill_seconds: What plain prefill takes at least, a token; None: not known.
        blend_seconds: What a blend takes beside the tokens that it computes; None: not known.
        shift_errors: In each layer, how far shifted keys are from those computed there, as a share of the largest;
            empty: not known.
    """

    refusal: str
    prefill_seconds: float | None = None
    blend_seconds: float | None = None
    shift_errors: tuple[float, ...] = ()
