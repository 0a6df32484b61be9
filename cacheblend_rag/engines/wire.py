"""What goes to and comes from the connector with each request: ``kv_transfer_params={"cacheblend": {...}}``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from cacheblend_rag import errors
from cacheblend_rag.chunks import ChunkScope, ModelFingerprint
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import CacheBlendError, UnsupportedModelError
from cacheblend_rag.stats import BlendStats, WarmReport
from cacheblend_rag.vllm.settings import PARAMS_KEY


def blend_params(config: BlendConfig, request_id: str) -> dict[str, Any]:
    """``kv_transfer_params`` of a request that generates, its stats to be found under a name."""
    settings = {**dataclasses.asdict(config), "check_layers": list(config.check_layers)}
    return {PARAMS_KEY: {**settings, "id": request_id}}


def action_params(action: str, value: Any = True) -> dict[str, Any]:
    """``kv_transfer_params`` of a request to ``warm``, ``evict``, ``describe`` or ``report``."""
    return {PARAMS_KEY: {action: value}}


def parse_answer(kv_transfer_params: Mapping[str, Any] | None) -> dict[str, Any]:
    """The connector's part of a response.

    Raises:
        UnsupportedModelError: the engine runs without the connector.
        CacheBlendError: the connector reports an error; of the kind it names.
    """
    ours = (kv_transfer_params or {}).get(PARAMS_KEY)
    if ours is None:
        raise UnsupportedModelError(
            "the engine answers without CacheBlend: start it with the connector, see docs/vllm.md"
        )
    if "error" in ours:
        kind = getattr(errors, str(ours.get("kind")), CacheBlendError)
        raise kind(ours["error"])
    return dict(ours)


def parse_stats(answer: Mapping[str, Any] | None, prompt_tokens: int) -> BlendStats:
    """Stats of a response; fields that another version sends besides are left out.

    Args:
        answer: The connector's part of the response, or what it reported later; None, or an error, if it is lost.
        prompt_tokens: Tokens in the prompt.
    """
    if answer is None or "decision" not in answer:
        reason = "the engine could not tell how this prompt was read"
        return BlendStats(prompt_tokens, missed_tokens=prompt_tokens, reason=reason)
    known = {field.name for field in dataclasses.fields(BlendStats)}
    return BlendStats(**{name: value for name, value in answer.items() if name in known})


def parse_scope(description: Mapping[str, Any]) -> ChunkScope:
    """Whose chunks an engine reads."""
    fingerprint = ModelFingerprint(**description["fingerprint"])
    return ChunkScope(description["namespace"], fingerprint, tuple(description["primer_ids"]))


class WarmTotals:
    """Adds up the answers to warm requests."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._sums = {"stored": 0, "already_there": 0, "tokens": 0, "bytes": 0}

    def add(self, answer: Mapping[str, Any]) -> None:
        """One more chunk."""
        for name in self._sums:
            self._sums[name] += answer[name]

    def add_known(self, chunks: int) -> None:
        """Repeats, and texts without tokens: nothing to store."""
        self._sums["already_there"] += chunks

    def report(self) -> WarmReport:
        """The totals."""
        return WarmReport(**self._sums, seconds=time.perf_counter() - self._started)
