"""Which tier is counted where the GPU keeps copies: on the host's side, with a stream that only says what it holds."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cacheblend_rag.chunks import ChunkKV, ChunkScope, ModelFingerprint
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.store import DiskStore, MemoryStore
from cacheblend_rag.vllm.worker_half import WorkerHalf, _Blend, _Read

SCOPE = ChunkScope("test", ModelFingerprint("model", "w", "c", "t", "float32"), ())


def chunk(n: int) -> ChunkKV:
    ids = np.full(n + 1, n, np.int32)
    return ChunkKV(SCOPE.key(ids), SCOPE, ids, 0, torch.zeros(2, 2, n + 1, 1, 4))


CHUNKS = [chunk(n) for n in range(3)]
SIZE = [one.nbytes for one in CHUNKS]


@pytest.mark.parametrize(
    ("holds", "takes", "expected"),
    [
        ([], True, {"memory": SIZE[0] + SIZE[1], "disk": SIZE[2]}),
        ([1], True, {"memory": SIZE[0], "gpu": SIZE[1], "disk": SIZE[2]}),
        ([0, 1], True, {"gpu": SIZE[0] + SIZE[1], "disk": SIZE[2]}),
        ([2], True, {"memory": SIZE[0] + SIZE[1], "disk": SIZE[2]}),  # it was read from there all the same
        ([0, 1, 2], False, {"memory": SIZE[0] + SIZE[1], "disk": SIZE[2]}),  # put in place without the GPU's copies
    ],
)
def test_what_the_gpu_keeps_is_taken_from_there(holds: list[int], takes: bool, expected: dict[str, int]) -> None:
    kept = {CHUNKS[n].key for n in holds}
    placed: list[Any] = []
    stream = SimpleNamespace(
        holds=kept.__contains__,
        # As the real one does, it keeps what it has put in place: what counts is what it held before.
        place=lambda prompts: kept.update(one.key for one in CHUNKS) or takes,
    )
    model: Any = SimpleNamespace(kernel_passes=SimpleNamespace(stream=stream), agree=lambda failed: failed)
    worker = WorkerHalf(model, MemoryStore(0))
    forward: Any = SimpleNamespace(block_ids=None, place=placed.extend)
    reads = [
        _Read(CHUNKS[0].key, "memory", SIZE[0], 0.25),
        _Read(CHUNKS[1].key, "memory", SIZE[1], 0.5),
        _Read(CHUNKS[2].key, "disk", SIZE[2], 1.0),
    ]
    pieces: Any = [(one, None) for one in CHUNKS]
    job: Any = None
    layout: Any = None
    blend = _Blend(job, BlendStats(6), forward, layout, pieces, reads, True)
    worker._place([blend])
    assert blend.stats.read_bytes == expected
    assert blend.stats.read_seconds.keys() == expected.keys()
    assert sum(blend.stats.read_seconds.values()) == 1.75
    assert placed == ([] if takes else pieces)


def test_heads_of_other_ranks_are_let_go(tmp_path: Path) -> None:
    """As soon as a rank has taken its own of a chunk that no memory tier keeps: a long prompt's are many."""
    whole: list[weakref.ref[torch.Tensor]] = []

    def own_heads(chunk: ChunkKV) -> ChunkKV:
        whole.append(weakref.ref(chunk.kv))
        return dataclasses.replace(chunk, kv=chunk.kv[:, :, :, :1].clone())

    kv = SimpleNamespace(num_kv_heads=1, head_dim=4, dtype=torch.float32)
    model: Any = SimpleNamespace(kernel_passes=None, own_heads=own_heads, kv=kv, layers=[None, None])
    with contextlib.closing(DiskStore(tmp_path)) as store:
        store.put(both := dataclasses.replace(CHUNKS[0], kv=torch.zeros(2, 2, 1, 2, 4)))
        reads: list[_Read] = []
        own = WorkerHalf(model, store)._read(both.key, reads)
    assert own is not None and own.kv.shape[3] == 1
    assert [(read.key, read.tier, read.nbytes) for read in reads] == [(both.key, "disk", both.nbytes)]
    assert [one() for one in whole] == [None]
