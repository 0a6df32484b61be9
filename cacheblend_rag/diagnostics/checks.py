"""What ``cacheblend doctor`` checks of a set-up: each check has a figure, and advice if it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.store import ChunkStore, open_store

if TYPE_CHECKING:
    from cacheblend_rag.engines.transformers import TransformersEngine

_PACKAGES = ("cacheblend-rag", "torch", "transformers", "vllm", "langchain-cacheblend", "llama-index-llms-cacheblend")
_PREFILLED = 512  # tokens that the rate is measured on
_READ = 16  # chunks
_OFF = {"mode": "off"}
# Of the largest key: below is rounding, a wrong rotation gives errors near 1.
_SHIFT_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_EXACT = 1e-4  # max abs difference of logits that is rounding, in float32; otherwise twice what rounding is seen to do


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


def check_model(engine: TransformersEngine) -> Check:
    """A model that has been loaded has been probed: it can be blended."""
    device = engine.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    fingerprint = engine.scope.fingerprint
    figure = f"{engine.num_layers} layers, {fingerprint.dtype}, on {where}, context {engine.context_window:,} tokens"
    return Check("model", True, figure)


def check_exactness(engine: TransformersEngine, prompt: str, chunks: Sequence[str]) -> list[Check]:
    """Whether blending is exact where it has to be: invariants I1 and I2, and the shift of keys in every layer.

    Args:
        engine: Its store is left alone.
        prompt: A prompt.
        chunks: Texts that it holds.
    """
    found = engine.measure_exactness(prompt, chunks)
    if np.isnan(found.everything):
        figure = "not measured: the sample prompt is longer than what this model blends"
        return [Check("blending is exact", True, figure)]
    most = max(_EXACT, 2 * found.rounding)
    bound = f"at most {most:.1e}: reading the prompt in two pieces changes {found.rounding:.1e}"
    checks = [
        _exact(
            "ratio 1 is full prefill", found.everything <= most, f"logits differ by {found.everything:.1e} ({bound})"
        )
    ]
    for ratio, difference in found.exact_kv.items():
        name = f"exact KV gives exact answers, ratio {ratio:g}"
        checks.append(_exact(name, difference <= most, f"logits differ by {difference:.1e}"))
    tolerance = _SHIFT_TOLERANCE[engine.scope.fingerprint.dtype]
    worst = int(np.argmax(found.shift))
    figure = f"error {found.shift[worst]:.1e} of the largest key at most, in layer {worst} (rounding: {tolerance:.0e})"
    return [*checks, _exact("keys can be shifted, in every layer", bool(found.shift[worst] <= tolerance), figure)]


def _exact(name: str, ok: bool, figure: str) -> Check:
    return Check(name, ok, figure, "" if ok else "this model is not blended exactly: please report it, with this table")


def cannot_be_opened(store: Path | None) -> Check | None:
    """The check that fails if there is no such store, or it can't be opened; None if it can, or none is asked for."""
    if store is None:
        return None
    if not store.is_dir() or not any(store.iterdir()):
        return Check(
            "store", False, f"there is none at {store}", f"cacheblend ingest DIR --model MODEL --store {store}"
        )
    try:
        open_store(store, memory_bytes=0).close()
    except CacheBlendError as error:
        return Check("store", False, str(error), f"cacheblend store verify --store {store}")
    return None


def check_store(store: Path | None, engine: TransformersEngine) -> list[Check]:
    """Whether a store that can be opened holds chunks of this model, and gives them sooner than they are computed."""
    if store is None:
        return []
    with contextlib.closing(open_store(store, memory_bytes=0)) as opened:
        return _check_opened(opened, engine)


def _check_opened(opened: ChunkStore, engine: TransformersEngine) -> list[Check]:
    entries = list(opened.entries())
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


def prefill_rate(engine: TransformersEngine) -> float:
    """Tokens a second of plain prefill."""
    ids = [token % 100 for token in range(min(_PREFILLED, engine.context_window - 1))]
    engine.generate(ids[:8], max_tokens=1, blend=_OFF)  # what is set up once, on first use
    return len(ids) / engine.generate(ids, max_tokens=1, blend=_OFF).stats.ttft
