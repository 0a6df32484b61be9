"""Brings chunk KV to the GPU and into the paged cache, layer by layer, beside the passes that need it.

Pinned memory is copied by the copy engine to a staging buffer, some layers of all chunks at a time, and rotated and
scattered from there, all on a stream of its own. An event tells when a layer is in place; a pass waits for it right
before that layer's attention, so that layers are computed while later ones are still on the bus.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.layout import upload
from cacheblend_rag.matching import Segment
from cacheblend_rag.vllm.model import PagedModel
from cacheblend_rag.vllm.pinning import PinnedChunks
from cacheblend_rag.vllm.placing import Runs, place_layers, work_items

_STAGING_BYTES = 512 << 20
_LAYERS = 4  # at most these at a time: the first ones should not wait for many


class _ResidentChunks:
    """Copies of the chunks used last, in the GPU's memory; all calls are on one stream.

    Args:
        device: The GPU.

    Attributes:
        max_bytes: Most bytes of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.max_bytes = 0
        self._device = device
        self._nbytes = 0
        self._copies: OrderedDict[str, torch.Tensor] = OrderedDict()  # least recently used first

    def get(self, key: str) -> torch.Tensor | None:
        """The KV of a chunk, if it is here."""
        return self._copies.get(key)

    def add(self, chunks: Sequence[ChunkKV]) -> None:
        """Keep chunks, in place of those that were used longest ago."""
        for chunk in chunks:
            if chunk.key in self._copies:
                self._copies.move_to_end(chunk.key)
            elif chunk.nbytes <= self.max_bytes:
                self._nbytes += chunk.nbytes
                while self._nbytes > self.max_bytes:
                    self._nbytes -= self._copies.popitem(last=False)[1].nbytes
                self._copies[chunk.key] = chunk.kv.to(self._device, non_blocking=True)


class LayerStream:
    """One a worker.

    Args:
        model: The worker's model, on a GPU, its KV at regular distances.

    Attributes:
        gpu_bytes: Most bytes of chunks that are kept in the GPU's memory, besides vLLM's; none to begin with.
        pinned: Which chunks are pinned.
        takes_float8: Whether the GPU can place chunks of 8-bit floats.

    Raises:
        torch.OutOfMemoryError: no room for the staging buffer.
    """

    def __init__(self, model: PagedModel) -> None:
        self._resident = _ResidentChunks(model.kv.device)
        self.pinned = PinnedChunks(model.kv.device)
        self._model = model
        self._stream: Any = torch.cuda.Stream(model.kv.device)  # type: ignore[no-untyped-call]
        # External: a captured graph waits for the event as it is when the graph runs, not as it was when captured.
        self._in_place: list[Any] = [_event(external=True) for _ in model.layers]
        for event in self._in_place:  # one that was never recorded does not exist, and a graph would not wait for it
            event.record()
        views = [model.kv.views(layer) for layer in range(len(model.layers))]
        self._keys, self._values = views[0]
        self._token_stride = model.kv.num_kv_heads * model.kv.head_dim
        self._caches = torch.tensor([[k.data_ptr(), v.data_ptr()] for k, v in views], device=model.kv.device)
        self._cache_scales = torch.tensor(model.kv.scales, device=model.kv.device)
        self.takes_float8 = torch.cuda.get_device_capability(model.kv.device) >= (8, 9)
        self._staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, device=model.kv.device)
        self._in_use: list[tuple[Any, object]] = []  # memory that the stream still reads
        self._passes_done = _event()  # of the prompt that was placed last

    @property
    def gpu_bytes(self) -> int:
        """See the class."""
        return self._resident.max_bytes

    @gpu_bytes.setter
    def gpu_bytes(self, most: int) -> None:
        self._resident.max_bytes = most

    def holds(self, key: str) -> bool:
        """Whether the GPU keeps a copy of a chunk, so that :meth:`place` would not copy it there."""
        return self._resident.get(key) is not None

    def wait(self, layer: int) -> None:
        """Let the current stream wait until a layer is in place."""
        torch.cuda.current_stream().wait_event(self._in_place[layer])

    def wait_for_all(self) -> None:
        """Let the current stream wait until everything is in place, after the last pass that waits layer by layer."""
        torch.cuda.current_stream().wait_stream(self._stream)
        self._passes_done.record()

    def place(self, prompts: Sequence[tuple[Sequence[tuple[ChunkKV, Segment]], torch.Tensor]]) -> bool:
        """Begin to put runs of chunks at their positions; see :meth:`wait`.

        Args:
            prompts: Chunks and where runs of them go in a prompt, with its block table, int64 ``[blocks]``.

        Returns:
            False: nothing was done, the staging buffer does not hold a layer of all that, or the GPU has no float8.
        """
        pieces = [(chunk, segment, block_ids) for of_prompt, block_ids in prompts for chunk, segment in of_prompt]
        dtype = pieces[0][0].kv.dtype  # chunks of one model and codec are alike
        if dtype == torch.float8_e4m3fn and not self.takes_float8:
            return False
        buffer = self._staging.view(dtype)
        resident = [self._resident.get(chunk.key) for chunk, _, _ in pieces]
        # A chunk that several runs are of is staged once.
        staged = {c.key: c for (c, _, _), copy in zip(pieces, resident, strict=True) if copy is None}
        sizes = [chunk.kv[0].numel() for chunk in staged.values()]
        layers = min(_LAYERS, buffer.numel() // sum(sizes)) if staged else len(self._in_place)
        if not layers:
            return False
        self._in_use = [(done, held) for done, held in self._in_use if not done.query()]
        starts = itertools.accumulate((layers * size for size in sizes[:-1]), initial=0)
        regions = dict(zip(staged, starts, strict=False))
        addresses = [
            buffer.data_ptr() + regions[chunk.key] * buffer.itemsize if copy is None else copy.data_ptr()
            for (chunk, _, _), copy in zip(pieces, resident, strict=True)
        ]
        runs = self._describe(pieces, addresses, [copy is not None for copy in resident])
        to_stage = [(self._pinned(chunk), regions[key]) for key, chunk in staged.items()]
        # A graph that is still to run must not meet the events of the next prompts: those come after that graph.
        self._passes_done.synchronize()
        # The tables are made on the current stream, where what the blocks held before is perhaps still being read.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for first in range(0, len(self._in_place), layers):
                last = min(first + layers, len(self._in_place))
                for kv, region in to_stage:
                    source = kv[first:last].reshape(-1)
                    buffer[region : region + len(source)].copy_(source, non_blocking=True)
                place_layers(
                    runs, self._caches, first, last - first, self._model.cos_sin, self._keys, self._values,
                    self._cache_scales, self._token_stride,
                )  # fmt: skip
                for layer in range(first, last):
                    self._in_place[layer].record()
            self._resident.add([chunk for chunk, _, _ in pieces])
            done = _event()
            done.record()
        self._in_use.append((done, (pieces, runs, resident)))
        return True

    def _pinned(self, chunk: ChunkKV) -> torch.Tensor:
        self.pinned.pin(chunk)
        return chunk.kv

    def _describe(
        self,
        pieces: Sequence[tuple[ChunkKV, Segment, torch.Tensor]],
        addresses: Sequence[int],
        whole: Sequence[bool],
    ) -> Runs:
        """Tables for the kernel; ``addresses`` are those of the chunks' first elements."""
        device = self._model.kv.device
        scales = [chunk.scales for chunk, _, _ in pieces if chunk.scales is not None]
        on_device = upload(torch.stack(scales), device) if scales else None
        of_runs = [
            (
                address + s.offset * self._token_stride * c.kv.itemsize,
                is_whole,
                c.kv.stride(0),
                c.kv.stride(1),
                c.start + s.offset,
                s.start,
                block_ids.data_ptr(),
                0 if on_device is None else on_device[n].data_ptr(),
            )
            for n, ((c, s, block_ids), address, is_whole) in enumerate(zip(pieces, addresses, whole, strict=True))
        ]
        table = torch.tensor(of_runs).T.contiguous()
        items = work_items([segment.length for _, segment, _ in pieces])
        return Runs(upload(table, device), upload(items, device), pieces[0][0].kv.dtype, on_device)


def _event(**options: bool) -> Any:
    return torch.cuda.Event(**options)  # type: ignore[no-untyped-call]
