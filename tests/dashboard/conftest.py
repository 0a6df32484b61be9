"""Requests and stores that a dashboard shows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from cacheblend_rag.chunks import ChunkKV, ChunkScope, ModelFingerprint
from cacheblend_rag.diagnostics.request_log import LoggedRequest, MemoryUse
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.store import DiskStore


def request(time: float = 1000.0, *, model: str = "a", namespace: str = "default", **changes: Any) -> LoggedRequest:
    """A request of 100 tokens that took a second, but for ``changes``."""
    memory: MemoryUse | None = changes.pop("memory", None)
    process, limit = changes.pop("process", 7), changes.pop("disk_max_bytes", None)
    stats = BlendStats(**{"prompt_tokens": 100, "missed_tokens": 100, "ttft": 1.0, **changes})
    return LoggedRequest(time, process, model, namespace, stats, memory, limit)


def blend(tokens: int, ttft: float, **changes: Any) -> LoggedRequest:
    return request(prompt_tokens=tokens, ttft=ttft, decision="blend", **changes)


def prefill(tokens: int, ttft: float, **changes: Any) -> LoggedRequest:
    return request(prompt_tokens=tokens, ttft=ttft, decision="prefill", **changes)


def engine(model: str = "a", namespace: str = "default", store: object = None) -> Engine:
    """All that a request log asks of an engine."""
    names = {"model_name": model, "scope": SimpleNamespace(namespace=namespace)}
    return cast(Engine, SimpleNamespace(**names, library=SimpleNamespace(store=store)))


def append(path: Path, *requests: LoggedRequest) -> None:
    with path.open("ab") as file:
        file.writelines(one.to_line() for one in requests)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of three chunks: two of model a, one of model b in another namespace."""
    directory = tmp_path / "store"
    with contextlib.closing(DiskStore(directory)) as opened:
        opened.put(chunk(30))
        opened.put(chunk(40))
        opened.put(chunk(200, model="b", namespace="legal"))
    return directory


def chunk(tokens: int, *, model: str = "a", namespace: str = "default") -> ChunkKV:
    scope = ChunkScope(namespace, ModelFingerprint(model, f"weights of {model}", "c", "t", "float32"), ())
    ids = np.arange(tokens, dtype=np.int32)
    return ChunkKV(scope.key(ids), scope, ids, start=0, kv=torch.zeros(2, 2, tokens, 1, 4))
