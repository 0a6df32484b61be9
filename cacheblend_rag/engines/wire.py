"""What goes to and comes from the connector with each request: ``kv_transfer_params={"cacheblend": {...}}``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cacheblend_rag import errors
from cacheblend_rag.chunks import ChunkScope, ModelFingerprint
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.base import Progress
from cacheblend_rag.errors import CacheBlendError, UnsupportedModelError
from cacheblend_rag.stats import BlendStats, WarmReport
from cacheblend_rag.trace import BlendTrace
from cacheblend_rag.vllm.settings import PARAMS_KEY


def blend_params(config: BlendConfig, request_id: str, *, trace: bool, uncounted: bool) -> dict[str, Any]:
    """``kv_transfer_params`` of a request that generates, its stats to be found under a name."""
    flags = {"trace": trace, "uncounted": uncounted}
    asked = {name: True for name, is_set in flags.items() if is_set}  # earlier servers refuse what they don't know
    return {PARAMS_KEY: {**config.to_dict(), "id": request_id, **asked}}


def action_params(action: str, value: Any = True) -> dict[str, Any]:
    """``kv_transfer_params`` of a request for anything but generation, see :class:`RequestParams`."""
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


def parse_trace(answer: Mapping[str, Any] | None) -> BlendTrace | None:
    """The trace of a response, see :func:`parse_stats`; None if there is none."""
    told = (answer or {}).get("trace")
    return None if told is None else BlendTrace.from_dict(told)


def parse_scope(description: Mapping[str, Any]) -> ChunkScope:
    """Whose chunks an engine reads."""
    fingerprint = ModelFingerprint(**description["fingerprint"])
    return ChunkScope(description["namespace"], fingerprint, tuple(description["primer_ids"]))


def warm(
    encoded: Sequence[list[int]],
    ask: Callable[[list[list[int]]], Iterable[Mapping[str, Any]]],
    progress: Progress | None,
) -> WarmReport:
    """Send warm requests and add up their answers.

    Args:
        encoded: Token ids of the chunks; repeats, and chunks without tokens, count as already there.
        ask: Sends chunks; gives the connector's answers, in order.
        progress: Called with (chunks done, chunks in all) after each.
    """
    started = time.perf_counter()
    new = [list(ids) for ids in dict.fromkeys(map(tuple, encoded)) if ids]
    done = len(encoded) - len(new)
    sums = {"stored": 0, "already_there": done, "tokens": 0, "bytes": 0}
    for answer in ask(new):
        for name in sums:
            sums[name] += answer[name]
        done += 1
        if progress is not None:
            progress(done, len(encoded))
    return WarmReport(**sums, seconds=time.perf_counter() - started)
