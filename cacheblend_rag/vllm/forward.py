"""Partial forward passes of the model that vLLM has loaded, over one prompt in its paged KV cache.

The model's own ``forward`` runs over any rows of the prompt, with attention left to vLLM's backend: each run of
neighbouring rows is one sequence over the same block table that ends at its last row's position, which makes the
backend's causal attention exact for it. Hooks on the attention layers watch or stop a pass. Nothing is written per
architecture.

That is the simple path, right everywhere. On a GPU, ``packing.py`` sends passes over scattered rows and over the
question to ``kernel_passes.py``, which gives the same in less time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from cacheblend_rag.attention.rows import watch
from cacheblend_rag.blending import Moment
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.layout import in_order, upload
from cacheblend_rag.matching import Segment
from cacheblend_rag.passes import SPAN
from cacheblend_rag.rope import rotate_keys, shift_table
from cacheblend_rag.store.codecs import decode
from cacheblend_rag.vllm.compat import fast_operators
from cacheblend_rag.vllm.model import PagedModel
from cacheblend_rag.vllm.paged_kv import PagedKV

_FEW_RUNS = 8  # of neighbouring rows: so few are fast as sequences of the backend
_MOST_ROWS = 2048  # of a pass of the simple path, whatever the engine's steps hold: larger ones gain nothing

Hook = Callable[[Any, tuple[torch.Tensor, ...]], None]


class _Stop(Exception):
    """Ends a pass early: what was asked for is known."""


class _GpuMoment:
    """The point that the current stream will have reached when it has done what it has been given."""

    def __init__(self) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def __sub__(self, earlier: _GpuMoment) -> float:
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


@dataclasses.dataclass(frozen=True)
class PromptRows:
    """Rows of one prompt, on the device.

    Attributes:
        token_ids: int64 ``[prompt tokens]``.
        positions: int64 ``[prompt tokens]``: what RoPE is told.
        rows: int64 ``[rows]``, ascending, at least one.
        block_ids: int64 ``[blocks]``: the prompt's block table.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    block_ids: torch.Tensor


class PagedForward:
    """One prompt in the paged KV cache. See ``blending.BlendForward``.

    Rows are passed to the model in slices, earlier ones first: later rows see the KV that the slices before them wrote,
    so the result is that of one pass, in bounded memory.

    Args:
        model: The worker's model.
        token_ids: int64 ``[tokens]``, the prompt.
        block_ids: Its block table.
        exact_tokens: Leading tokens whose KV is in place; their blocks are only read.

    Attributes:
        block_ids: int64 ``[blocks]``: its block table, on the device.
        deviation_passes: Rows and layer of each call of :meth:`deviations`, which leave fresh KV behind.
    """

    def __init__(self, model: PagedModel, token_ids: torch.Tensor, block_ids: Sequence[int], exact_tokens: int) -> None:
        self.num_layers = len(model.layers)
        self.exact_tokens = exact_tokens
        self.deviation_passes: list[tuple[torch.Tensor, int]] = []
        self._model = model
        self._token_ids = upload(token_ids, model.kv.device)
        self._positions = torch.arange(len(token_ids), device=model.kv.device)
        blocks = -(-len(token_ids) // model.kv.block_size)
        self.block_ids = upload(torch.tensor(block_ids[:blocks], dtype=torch.int64), model.kv.device)

    def now(self) -> Moment:
        """See :meth:`blending.BlendForward.now`."""
        return _GpuMoment() if self._token_ids.is_cuda else time.perf_counter()

    def affordable_rows(self, rows: int) -> int:
        """See :meth:`blending.BlendForward.affordable_rows`."""
        passes = self._model.kernel_passes
        # The last row of the prompt, which is left to vLLM, is none of the pass.
        return rows if passes is None else passes.affordable_rows(rows - 1) + 1

    def place(self, pieces: Sequence[tuple[ChunkKV, Segment]]) -> None:
        """Write the KV of runs of chunks, this rank's heads of them, at their positions, keys shifted there."""
        model, device = self._model, self._model.kv.device
        old = torch.cat([torch.arange(s.length, device=device) + (c.start + s.offset) for c, s in pieces])
        new = torch.cat([torch.arange(s.start, s.end, device=device) for _, s in pieces])
        shift = shift_table(model.rotary_table(old), model.rotary_table(new))
        slots = self._slots(new)

        def run(chunk: ChunkKV, segment: Segment, layer: int) -> torch.Tensor:
            kv = chunk.kv[layer, :, segment.offset : segment.offset + segment.length].to(device)
            scales = None if chunk.scales is None else chunk.scales[layer].to(device)
            return decode(kv, scales, model.kv.dtype)

        for layer in range(self.num_layers):  # one at a time: the float32 copies stay small
            keys, values = torch.cat([run(chunk, segment, layer) for chunk, segment in pieces], dim=1)
            shifted = torch.empty_like(keys)
            rotate_keys(keys, shift, out=shifted)
            model.kv.write(layer, shifted, values, slots)

    def read(self, start: int, end: int) -> torch.Tensor:
        """The KV at positions ``start .. end - 1``, this rank's heads: ``[layers, 2, tokens, kv_heads, head_dim]``."""
        if self._model.kernel_passes is not None:
            self._model.kernel_passes.stream.wait_for_all()
        first = start // self._model.kv.block_size
        blocks = self.block_ids[first : -(-end // self._model.kv.block_size)]
        wanted = slice(start - first * self._model.kv.block_size, end - first * self._model.kv.block_size)
        kv = self._model.kv
        return torch.stack(
            [
                torch.stack([kv.read_keys(layer, blocks)[wanted], kv.read_values(layer, blocks)[wanted]])
                for layer in range(self.num_layers)
            ]
        )

    def deviations(self, rows: torch.Tensor, layer: int, keys: bool = False) -> torch.Tensor:
        """See :meth:`blending.BlendForward.deviations`. Summed over ranks: all have to choose the same tokens."""
        self.deviation_passes.append((rows, layer))
        kernel_passes = self._model.kernel_passes
        if kernel_passes is not None and is_scattered(rows):
            parts = [kernel_passes.deviations(part, layer, keys) for part in self.slices(rows)]
            summed: torch.Tensor = self._model.tp.all_reduce(torch.cat(parts))
            return summed
        found: list[torch.Tensor] = []
        attention = self._model.layers[layer]
        kv = self._model.kv

        for part, where in self._slices(rows):

            def measure(module: Any, args: tuple[torch.Tensor, ...], where: torch.Tensor = where) -> None:
                key, value = (x.view(-1, kv.num_kv_heads, kv.head_dim) for x in args[1:3])
                if kernel_passes is not None:
                    kernel_passes.stream.wait(layer)
                found.append(measure_deviations(kv, layer, self.block_ids, where, key if keys else None, value))
                kv.write(layer, key, value, self._slots(where))
                raise _Stop

            with self._in_place(layer), _hooked([attention], before=measure), contextlib.suppress(_Stop):
                self._run(part, where)
        deviation: torch.Tensor = self._model.tp.all_reduce(torch.cat(found))
        return deviation

    def question_attention(
        self, rows: torch.Tensor, weights: torch.Tensor, layers: range, unread: torch.Tensor
    ) -> torch.Tensor:
        """See :meth:`blending.BlendForward.question_attention`. The mean is over all ranks' heads."""
        asked = self.leaving_out(rows, unread)
        given = asked.forward._question_attention(asked.rows, weights, layers)
        self.extend_exact(rows)
        return asked.spread(given)

    def leaving_out(self, rows: torch.Tensor, unread: torch.Tensor) -> AskedPrompt:
        """The prompt as rows see it that don't see some spans of it. What that takes is to leave out their blocks."""
        block_size = self._model.kv.block_size
        if SPAN % block_size:  # larger blocks: more of it is read than has to be
            rows, unread = in_order(rows, unread), unread[:0]
        if not len(unread):
            return AskedPrompt(self, rows, None, len(self._token_ids))
        is_seen = np.ones(len(self._token_ids), bool)
        is_seen[unread.cpu().numpy()] = False
        seen = np.flatnonzero(is_seen)
        where = upload(torch.from_numpy(seen), self._model.kv.device)
        part = copy.copy(self)
        part._token_ids, part._positions = self._token_ids[where], self._positions[where]
        part.block_ids = self.block_ids[where[::block_size] // block_size]
        rows = torch.from_numpy(np.searchsorted(seen, rows.cpu().numpy()))
        return AskedPrompt(part, rows, where, len(self._token_ids))

    def _question_attention(self, rows: torch.Tensor, weights: torch.Tensor, layers: range) -> torch.Tensor:
        model, kv = self._model, self._model.kv
        total = torch.zeros(len(self._token_ids), dtype=torch.float32, device=kv.device)
        weights = upload(weights, kv.device)
        numbers = {id(model.layers[layer]): layer for layer in layers}
        first = len(weights) - len(rows)  # in weights: of the part's rows; none count before 0
        for part, where in self._slices(rows):
            counted = weights[max(first, 0) : max(first + len(part), 0)]
            first += len(part)
            if not len(counted):
                with self._in_place(self.num_layers):
                    self._run(part, where)
                continue
            end = int(part[-1]) + 1
            asked = where[-len(counted) :]
            blocks = self.block_ids[: -(-end // kv.block_size)]

            def look(
                module: Any,
                args: tuple[torch.Tensor, ...],
                asked: torch.Tensor = asked,
                counted: torch.Tensor = counted,
                end: int = end,
                blocks: torch.Tensor = blocks,
            ) -> None:
                query = args[0].view(-1, module.num_heads, kv.head_dim)[-len(asked) :].transpose(0, 1)
                layer = numbers[id(module)]
                keys, values = kv.read_keys(layer, blocks)[:end], kv.read_values(layer, blocks)[:end]
                seen = (keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
                total[:end] += watch(query[None], *seen, asked, counted, module.impl.scale)
                if layer == self.num_layers - 1:
                    raise _Stop

            watched = [model.layers[n] for n in layers]
            with self._in_place(self.num_layers), _hooked(watched, after=look), contextlib.suppress(_Stop):
                self._run(part, where)
        given: torch.Tensor = model.tp.all_reduce(total)
        return given.div_(model.tp.world_size * len(layers))

    def recompute(self, rows: torch.Tensor) -> torch.Tensor:
        """See :meth:`blending.BlendForward.recompute`. The prompt's last token is left to vLLM's own step."""
        for part, where in self._slices(rows[:-1]):
            with self._in_place(self.num_layers):
                self._run(part, where)
        return torch.empty(0)

    def slices(self, rows: torch.Tensor) -> list[PromptRows]:
        """Rows as the kernels take them, as many at a time as a pass has room for."""
        if not len(rows):
            return []
        parts = torch.split(upload(rows, self._model.kv.device), self._model.max_rows)
        return [PromptRows(self._token_ids, self._positions, part, self.block_ids) for part in parts]

    def _run(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last layer, ``[rows, hidden_size]``; see :meth:`_slices`."""
        token_ids, positions = self._token_ids[where], self._positions[where]
        return run_rows(self._model, token_ids, where, positions, self.block_ids, on_cpu=rows)

    def _slices(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows as the simple path takes them, on the CPU and on the device."""
        if not len(rows):
            return iter(())
        most = min(self._model.max_rows, _MOST_ROWS)
        where = upload(rows, self._model.kv.device)  # once: each upload takes memory that is pinned for it
        return zip(torch.split(rows.cpu(), most), torch.split(where, most), strict=True)

    @contextlib.contextmanager
    def _in_place(self, layers: int) -> Iterator[None]:
        """The first so many layers wait, before their attention, for the KV that is on its way to them."""
        with contextlib.ExitStack() as hooks:
            if (passes := self._model.kernel_passes) is not None:
                for number, layer in enumerate(self._model.layers[:layers]):
                    wait = functools.partial(passes.stream.wait, number)
                    hooks.callback(layer.register_forward_pre_hook(lambda *_, wait=wait: wait()).remove)
            yield

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        return slot_mapping(positions, self.block_ids, self._model.kv.block_size)

    def extend_exact(self, rows: torch.Tensor) -> None:
        """Rows that follow the exact tokens without a gap have become exact."""
        following = rows[rows >= self.exact_tokens]
        in_order = following == torch.arange(self.exact_tokens, self.exact_tokens + len(following))
        self.exact_tokens += int(in_order.long().cumprod(0).sum())


@dataclasses.dataclass(frozen=True)
class AskedPrompt:
    """A prompt that a question is asked of, or what it is to see of it.

    Attributes:
        forward: The prompt, or a shorter one of those of its tokens that are seen, which stand where they stood.
        rows: What is run: places in it.
        seen: int64, on the device: the positions of its tokens; None: all.
        length: Tokens of the whole prompt.
    """

    forward: PagedForward
    rows: torch.Tensor
    seen: torch.Tensor | None
    length: int

    def spread(self, given: torch.Tensor) -> torch.Tensor:
        """What each seen token gives, as what each token gives: others nothing."""
        if self.seen is None:
            return given
        return given.new_zeros(self.length).index_copy_(0, self.seen, given)


def run_rows(
    model: PagedModel,
    token_ids: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    block_ids: torch.Tensor,
    *,
    on_cpu: torch.Tensor | None = None,
) -> torch.Tensor:
    """One forward pass of the model over some rows of a sequence, whose KV it writes.

    Args:
        model: The worker's model.
        token_ids: int64 ``[rows]``.
        rows: int64 ``[rows]``, ascending: places in the block table; a row sees the places up to its own.
        positions: int64 ``[rows]``: what RoPE is told.
        block_ids: int64 ``[blocks]``: the sequence's block table.
        on_cpu: The rows again, on the CPU; None: the host waits for the GPU here.

    Returns:
        Hidden states after the last layer, ``[rows, hidden_size]``.
    """
    places = rows.cpu() if on_cpu is None else on_cpu
    starts = _runs(places)
    bounds = torch.cat([starts, torch.tensor([len(places)])]).to(torch.int32)
    ends = (places[bounds[1:].long() - 1] + 1).to(torch.int32)
    device = model.kv.device
    slots = slot_mapping(rows, block_ids, model.kv.block_size)
    metadata = model.metadata_builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=upload(bounds, device),
            query_start_loc_cpu=bounds,
            seq_lens=upload(ends, device),
            num_reqs=len(starts),
            num_actual_tokens=len(places),
            max_query_len=int(bounds.diff().max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=block_ids.to(torch.int32).expand(len(starts), -1).contiguous(),
            slot_mapping=slots,
        ),
        fast_build=True,
    )
    with (
        fast_operators(model.native_operators),
        set_forward_context(
            dict.fromkeys(model.layer_names, metadata),
            model.vllm_config,
            num_tokens=len(places),
            slot_mapping=dict.fromkeys(model.layer_names, slots),
            skip_compiled=True,
        ),
    ):
        hidden: torch.Tensor = model.model(
            input_ids=token_ids, positions=positions.contiguous(), intermediate_tensors=None, inputs_embeds=None
        )
    return hidden


def measure_deviations(
    kv: PagedKV,
    layer: int,
    block_ids: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor,
) -> torch.Tensor:
    """Squared distances between fresh KV, which is not written yet, and cached, over this rank's heads.

    Args:
        kv: The cache.
        layer: Where both are from.
        block_ids: int64 ``[blocks]``: the sequence's block table.
        positions: int64 ``[rows]``.
        keys: Fresh keys ``[rows, kv_heads, head_dim]``; None: they don't count.
        values: Fresh values.

    Returns:
        float32 ``[rows]``.
    """
    found = _squared_distances(values, kv.values_at(layer, block_ids, positions))
    if keys is not None:
        found += _squared_distances(keys, kv.keys_at(layer, block_ids, positions))
    return found


def _squared_distances(fresh: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    return (fresh.float() - cached.float()).square().sum(dim=(1, 2))


def is_scattered(rows: torch.Tensor) -> bool:
    """Whether rows had better go to the kernels: what is chosen on the GPU, where looking would stall it, is."""
    return rows.is_cuda or len(_runs(rows)) > _FEW_RUNS


def _runs(rows: torch.Tensor) -> torch.Tensor:
    """Where runs of neighbouring rows begin: indices into rows (on the CPU, at least one)."""
    return torch.from_numpy(np.concatenate([[0], np.flatnonzero(np.diff(rows.numpy()) != 1) + 1]))


def slot_mapping(places: torch.Tensor, block_ids: torch.Tensor, block_size: int) -> torch.Tensor:
    """The cache slots of some places of a sequence (int64 ``[tokens]``)."""
    return block_ids[places // block_size] * block_size + places % block_size


@contextlib.contextmanager
def _hooked(
    modules: Sequence[torch.nn.Module], *, before: Hook | None = None, after: Hook | None = None
) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before) for module in modules if before]
    handles += [
        module.register_forward_hook(lambda module, args, output: after(module, args)) for module in modules if after
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
