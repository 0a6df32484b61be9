"""Pins the memory of chunks, so that the GPU can read it where it lies."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from typing import Any

import torch

from cacheblend_rag.chunks import ChunkKV

logger = logging.getLogger(__name__)


class PinnedChunks:
    """Remembers which chunks are pinned; they are let go when nobody holds them any more.

    Args:
        device: The GPU that is to read them. A thread's own is the first one unless it says otherwise, so each rank but
            the first would open that one too, which takes seconds and hundreds of megabytes there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned: weakref.WeakSet[ChunkKV] = weakref.WeakSet()
        self._refused = False
        self._lock = threading.Lock()

    def pin(self, chunk: ChunkKV) -> bool:
        """Pin a chunk's KV in place; returns whether it is pinned now.

        A system that allows no more pinned memory is no error: the KV is copied then. Threads may share this.
        """
        with self._lock, torch.cuda.device(self._device):
            return self._pin(chunk)

    def _pin(self, chunk: ChunkKV) -> bool:
        if chunk in self._pinned:
            return True
        if self._refused or not chunk.kv.is_contiguous():
            return False
        address = chunk.kv.data_ptr()
        error = _runtime().cudaHostRegister(address, chunk.kv.nbytes, 0)
        if int(error) != 0:
            self._refused = True
            with contextlib.suppress(RuntimeError):  # whoever uses the GPU next is told of it, too
                torch.zeros(1, device=self._device)
            logger.warning("chunk KV can't be pinned (%s): it is copied to the GPU, which is slower", error)
            return False
        self._pinned.add(chunk)
        # Runs before the chunk lets go of its memory.
        weakref.finalize(chunk, _unpin, address, self._device).atexit = False
        return True


def _unpin(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):  # in whatever thread it is that lets go last
        _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
