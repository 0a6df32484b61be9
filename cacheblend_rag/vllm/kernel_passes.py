"""Passes of the model over scattered rows on a GPU: our own attention kernels, replayed as CUDA graphs.

The model's own ``forward`` runs, as on the simple path, with one thing exchanged: while it does, its attention layers
call :meth:`KernelPasses._attend`. Rows of several prompts may share a pass. Everything that differs between passes
(token ids, positions, slots, block tables) is in buffers on the device, so that one graph serves all passes of as many
rows: launching it takes a fraction of a millisecond, where the launches of 32 layers take longer than the GPU needs for
them.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context

from cacheblend_rag.attention.paged import PagedRows, attend_rows, tile_rows
from cacheblend_rag.attention.prefix import BUCKET, Buckets, attend_buckets
from cacheblend_rag.attention.watching import watch_rows
from cacheblend_rag.layout import upload
from cacheblend_rag.memory_plan import room_for_chunks
from cacheblend_rag.vllm.compat import fast_operators, flash_attention_3
from cacheblend_rag.vllm.forward import PromptRows, is_scattered, measure_deviations
from cacheblend_rag.vllm.model import PagedModel
from cacheblend_rag.vllm.packing import MOST_PROMPTS
from cacheblend_rag.vllm.streaming import LayerStream

logger = logging.getLogger(__name__)

# A pass over more rows than these is worth an eager launch, and is sliced by the engine's own limit anyway.
_MOST_CAPTURED = 8192
# Rows of a question, its template, and the edges of what was not warm.
_MOST_WATCHED = 512
# From so many rows on, FlashAttention takes the keys that the rows of a bucket share.
_FEW = 128
# Programs that keep an H100 busy: in a pass of few rows, the keys are divided among more of them.
_PROGRAMS = 1056
_MOST_SPLITS = 16
# Rounding down may cost so much of what would be recomputed, no more; otherwise rows are repeated to fill the graph.
_MOST_LOST = 1 / 12
# Of a GPU, what a step of vLLM may need beside weights and KV cache.
_FOR_A_STEP = 0.1


class _Stop(Exception):
    """Ends a pass early: what was asked for is known."""


class KernelPasses:
    """One a worker.

    Args:
        model: The worker's model, on a GPU, its KV at regular distances.
        graphs: Whether passes are captured.

    Attributes:
        stream: What brings chunk KV; passes wait for it layer by layer.
        most_rows: Most rows of a pass, those of each prompt rounded up to :meth:`unit`.
        most_watched: Most rows of :meth:`question_attention`, those of each prompt rounded up to :attr:`tile`.
        tile: See :func:`tile_rows`.
    """

    def __init__(self, model: PagedModel, *, graphs: bool) -> None:
        self.stream = LayerStream(model)
        self.most_rows = -(-model.max_rows // BUCKET) * BUCKET
        self.most_watched = min(_MOST_WATCHED, self.most_rows)
        self._model = model
        kv, device = model.kv, model.kv.device
        self._heads: int = model.layers[0].num_heads
        self.tile = tile_rows(self._heads, kv.num_kv_heads)
        # FlashAttention 3 would take queries of 8 bits with such keys, and lose more than the cache has.
        self._flash_attention = None if kv.is_float8 else flash_attention_3(model.layers[0])
        self._views = [kv.views(layer) for layer in range(len(model.layers))]
        tokens = model.vllm_config.model_config.max_model_len
        most, prompts = self.most_rows, MOST_PROMPTS
        self._token_ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._places = torch.zeros(most, dtype=torch.int32, device=device)
        self._slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._tile_sequence = torch.zeros(most // self.tile, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(prompts, -(-tokens // kv.block_size), dtype=torch.int32, device=device)
        # Of each row in each layer: which layers count is data, so that one graph serves any.
        self._weights = torch.zeros(len(model.layers), self.most_watched, dtype=torch.float32, device=device)
        self._given = torch.zeros(prompts, kv.num_kv_heads, tokens, dtype=torch.float32, device=device)
        self._sizes = _sizes(min(_MOST_CAPTURED, self.most_rows), self.tile) if graphs else []
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        if graphs:
            self._capture_all()

    def affordable_rows(self, rows: int) -> int:
        """The rows of the largest graph that holds no more, if that leaves out few."""
        at = bisect.bisect_right(self._sizes, rows)
        if at and rows < self._sizes[-1] and rows - self._sizes[at - 1] <= rows * _MOST_LOST:
            return self._sizes[at - 1]
        return rows

    def takes(self, rows: torch.Tensor) -> bool:
        """Whether rows (on the CPU or the device) are recomputed here rather than on the simple path."""
        return len(rows) > 0 and (len(rows) <= self.most_watched or is_scattered(rows))

    def takes_question(self, rows: torch.Tensor) -> bool:
        """Whether :meth:`question_attention` is for these rows."""
        return 0 < len(rows) <= min(self.most_watched, self._model.max_rows)  # in one pass

    def recompute(self, prompts: Sequence[PromptRows]) -> None:
        """Run rows through all layers, for the KV they leave."""
        self._run(prompts, watching=False)

    def question_attention(
        self, prompts: Sequence[PromptRows], weights: Sequence[torch.Tensor], layers: Sequence[range]
    ) -> list[torch.Tensor]:
        """Run rows through all layers; returns what each token gives to the questions' attention.

        For each prompt what :class:`cacheblend_rag.passes.QuestionAttention` says of its weights and layers, but of
        this rank's heads.
        """
        self._given[: len(prompts)].zero_()
        self._weights.zero_()
        first = 0
        for prompt, of_question, counting in zip(prompts, weights, layers, strict=True):
            end = first + len(prompt.rows)
            counted = upload(of_question, self._weights.device)
            self._weights[counting.start : counting.stop, end - len(counted) : end].copy_(counted)
            first = _round_up(end, self.tile)
        self._run(prompts, watching=True)
        return [
            self._given[n, :, : len(prompt.token_ids)].sum(dim=0).div_(self._heads * len(counting))
            for n, (prompt, counting) in enumerate(zip(prompts, layers, strict=True))
        ]

    def deviations(self, prompt: PromptRows, layer: int, keys: bool) -> torch.Tensor:
        """Run rows up to the values of a layer, and keep their KV; see :class:`cacheblend_rag.passes.Deviations`."""
        count = len(prompt.rows)
        size = self._fill([prompt], _round_up(count, self.unit(count)), self.tile)
        found: list[torch.Tensor] = []

        def measure(key: torch.Tensor, value: torch.Tensor) -> None:
            where, counted = _padded(prompt.rows, size), key if keys else None
            found.append(measure_deviations(self._model.kv, layer, prompt.block_ids, where, counted, value))

        self._forward(size, stop=layer, before_stop=measure)
        return found[0][:count]

    def _run(self, prompts: Sequence[PromptRows], *, watching: bool) -> None:
        rows = sum(_round_up(len(prompt.rows), self.tile) for prompt in prompts)
        unit = self.tile if watching else self.unit(rows)
        rows = sum(_round_up(len(prompt.rows), unit) for prompt in prompts)
        at = bisect.bisect_left(self._sizes, rows)
        size = self._sizes[at] if at < len(self._sizes) else rows
        self._fill(prompts, size, unit)
        graph = self._graphs.get((size, watching))
        if graph is not None:
            graph.replay()
        else:
            self._forward(size, stop=len(self._model.layers) - 1, watching=watching)

    def _fill(self, prompts: Sequence[PromptRows], size: int, unit: int) -> int:
        """Put a pass into the buffers, each prompt's rows up to a multiple of ``unit``, the last one's up to ``size``.

        A prompt's last row is repeated for that: it then writes the same KV more than once.
        """
        block_size = self._model.kv.block_size
        counts = [_round_up(len(prompt.rows), unit) for prompt in prompts]
        counts[-1] += size - sum(counts)
        rows = torch.cat([_padded(prompt.rows, count) for prompt, count in zip(prompts, counts, strict=True)])
        each = list(zip(prompts, torch.split(rows, counts), strict=True))
        torch.cat([prompt.token_ids[of_prompt] for prompt, of_prompt in each], out=self._token_ids[:size])
        blocks = torch.cat([prompt.block_ids[of_prompt // block_size] for prompt, of_prompt in each])
        torch.add(rows % block_size, blocks, alpha=block_size, out=self._slots[:size])
        torch.cat([prompt.positions[of_prompt] for prompt, of_prompt in each], out=self._positions[:size])
        self._places[:size] = rows
        tiles = np.repeat(np.arange(len(prompts), dtype=np.int32), np.array(counts) // self.tile)
        self._tile_sequence[: size // self.tile].copy_(upload(torch.from_numpy(tiles), rows.device))
        for number, prompt in enumerate(prompts):
            self._block_table[number, : len(prompt.block_ids)] = prompt.block_ids
        return size

    def unit(self, rows: int) -> int:
        """What the rows of each prompt are rounded up to a multiple of, in a pass of so many rows."""
        return BUCKET if self._flash_attention is not None and rows > _FEW else self.tile

    def _forward(
        self,
        size: int,
        *,
        stop: int,
        watching: bool = False,
        before_stop: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        """One pass over the first ``size`` rows of the buffers, up to the attention of layer ``stop``.

        What comes after that is for the next layer, or for logits that nobody asks for.
        """
        model = self._model
        rows = PagedRows(self._places[:size], self._tile_sequence[: size // self.tile], self._block_table)
        buckets = None
        if not watching and self.unit(size) == BUCKET and self._flash_attention is not None:
            buckets = Buckets.of(rows)
        attend = functools.partial(
            self._attend, rows=rows, buckets=buckets, stop=stop, watching=watching, before_stop=before_stop
        )
        with (
            _exchanged(model.layers, attend),
            fast_operators(model.native_operators),
            set_forward_context(None, model.vllm_config, num_tokens=size, skip_compiled=True),
            contextlib.suppress(_Stop),
        ):
            model.model(
                input_ids=self._token_ids[:size],
                positions=self._positions[:size],
                intermediate_tensors=None,
                inputs_embeds=None,
            )

    def _attend(
        self,
        number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        rows: PagedRows,
        buckets: Buckets | None,
        stop: int,
        watching: bool,
        before_stop: Callable[[torch.Tensor, torch.Tensor], None] | None,
        **__: Any,
    ) -> torch.Tensor:
        """What an attention layer does in our passes: ``[rows, heads * head_dim]``, KV written."""
        layer, kv = self._model.layers[number], self._model.kv
        count = len(rows.positions)
        query = query.view(count, self._heads, kv.head_dim)
        key, value = (x.view(count, kv.num_kv_heads, kv.head_dim) for x in (key, value))
        self.stream.wait(number)
        if number == stop and before_stop is not None:
            before_stop(key, value)
        kv.write(number, key, value, self._slots[:count])
        if number == stop and not watching:
            raise _Stop
        keys, values = self._views[number]
        scale: float = layer.impl.scale
        if buckets is not None:
            assert self._flash_attention is not None
            return attend_buckets(self._flash_attention, query, keys, values, buckets, scale).view(count, -1)
        programs = count // self.tile * kv.num_kv_heads
        splits = 1 << max(1, min(_MOST_SPLITS, _PROGRAMS // programs)).bit_length() - 1  # each is compiled for
        lse = torch.empty(count, self._heads, dtype=torch.float32, device=query.device) if watching else None
        key_scale, value_scale = kv.scales[number]
        out = attend_rows(
            query, keys, values, rows, scale, splits=splits, lse=lse, key_scale=key_scale, value_scale=value_scale
        )
        if lse is not None:
            watch_rows(
                query, keys, values, rows, lse, self._weights[number, :count], scale, self._given,
                key_scale=key_scale, value_scale=value_scale,
            )  # fmt: skip
        if number == stop:
            raise _Stop
        return out.view(count, -1)

    def _capture_all(self) -> None:
        """Capture a graph for every size, the largest first: the smaller ones then live in its memory.

        The rows written meanwhile are in the null block, which nobody reads.
        """
        last = len(self._model.layers) - 1
        zero = torch.zeros(1, dtype=torch.int64, device=self._positions.device)
        nowhere = PromptRows(zero, zero, zero, zero)
        pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(), graph_capture(device=self._positions.device) as context:
            for watching in (False, True):
                sizes = [size for size in self._sizes if not watching or size <= self.most_watched]
                for size in reversed(sizes):
                    self._fill([nowhere], size, self.tile)
                    if size in (sizes[0], sizes[-1]) or not watching:  # compiles kernels, fills caches
                        self._forward(size, stop=last, watching=watching)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=context.stream):
                        self._forward(size, stop=last, watching=watching)
                    self._graphs[size, watching] = graph
        self._given.zero_()


def make_kernel_passes(model: PagedModel, gpu_bytes: int) -> KernelPasses | None:
    """Kernel passes, if this worker can have them; what is missing is logged once."""
    reason = _obstacle(model)
    if reason is None:
        try:
            passes = KernelPasses(model, graphs=not model.vllm_config.model_config.enforce_eager)
            passes.stream.gpu_bytes = _bounded(gpu_bytes, model)  # beside what the passes need themselves
            return passes
        except Exception as error:
            # Out of memory, or a kernel that does not compile here.
            reason = (str(error) or repr(error)).splitlines()[0]
            gc.collect()
            torch.cuda.empty_cache()
    if model.kv.device.type == "cuda":
        logger.warning("blending runs on the attention backend's own kernels, which takes longer: %s", reason)
    return None


def _bounded(gpu_bytes: int, model: PagedModel) -> int:
    """As many bytes of chunks as leave vLLM what it has planned for: out of memory, it would end."""
    if not gpu_bytes:
        return 0
    free, total = torch.cuda.mem_get_info(model.kv.device)
    cache = model.vllm_config.cache_config
    utilization = cache.gpu_memory_utilization
    if cache.kv_cache_memory_bytes is not None:  # then vLLM takes that, and a step's needs are not known
        utilization = min(1 - free / total + _FOR_A_STEP, 1.0)
    room = room_for_chunks(gpu_bytes, free, total, utilization)
    if room < gpu_bytes:
        logger.warning(
            "gpu_bytes is %d, but beside what vLLM has planned for (gpu_memory_utilization %g) %d are free, and used: "
            "lower gpu_memory_utilization to have more",
            gpu_bytes,
            utilization,
            room,
        )
    return room


def _obstacle(model: PagedModel) -> str | None:
    kv = model.kv
    if kv.device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(kv.device) < (8, 0):
        return "the GPU is older than Ampere"
    if kv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its KV cache is of {kv.dtype}"
    if kv.is_float8 and torch.cuda.get_device_capability(kv.device) < (8, 9):
        return "the GPU has no 8-bit floats"
    if kv.head_dim > 256:
        return f"its attention heads have {kv.head_dim} dimensions, more than 256"
    if not kv.is_strided:
        return "its KV cache is laid out in an unknown way"
    return None


def _sizes(most: int, tile: int) -> list[int]:
    """Rows of the graphs, ascending: after the smallest, steps of a few percent, so that little is lost or repeated.

    Multiples of a bucket, but for one that a short question fits.
    """
    sizes = [tile] if tile < BUCKET else []
    for first, last, step in ((0, 1024, BUCKET), (1024, 4096, 256), (4096, most, 512)):
        sizes += range(first + step, last + 1, step)
    return [size for size in sizes if size <= most]


def _padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows, the last one repeated."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows))]) if count > len(rows) else rows


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@contextlib.contextmanager
def _exchanged(layers: list[Any], attend: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Attention layers that do something else for the time being."""
    for number, layer in enumerate(layers):
        layer.forward = functools.partial(attend, number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
