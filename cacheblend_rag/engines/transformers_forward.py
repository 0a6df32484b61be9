"""Partial forward passes of a stock transformers model over one prompt.

The model's own ``forward`` is called with any subset of a prompt's tokens and their positions. Three things of ours
take part: a cache that writes each row's KV at its position, an attention function that masks by position, and a way to
stop a pass once a layer's values are known. Nothing is written per architecture.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, Cache, PreTrainedModel

from cacheblend_rag.attention.rows import RowAttention, attend_and_watch
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.errors import UnsupportedModelError
from cacheblend_rag.rope import RotaryTable, rotate_keys, shift_table
from cacheblend_rag.store.codecs import decode

ATTENTION_NAME = "cacheblend"


class _Stop(Exception):
    """Ends a pass early: what was asked for is known."""


class PromptForward:
    """One sequence of tokens: its KV, and passes of the model over any of its rows. See ``blending.BlendForward``.

    Args:
        model: A causal LM whose attention implementation is :data:`ATTENTION_NAME`.
        token_ids: int64 ``[tokens]`` on the model's device. Tokens to generate may be appended later with
            :meth:`decode`.
        kv: Buffer ``[layers, 2, capacity, kv_heads, head_dim]`` with room for all tokens, keys at index 0, values at 1.
        first_position: What RoPE is told of the first token.
    """

    def __init__(
        self, model: PreTrainedModel, token_ids: torch.Tensor, kv: torch.Tensor, *, first_position: int = 0
    ) -> None:
        self.num_layers = kv.shape[0]
        self.exact_tokens = 0
        self._model = model
        self._token_ids = token_ids
        self._kv = kv
        self._first_position = first_position

    def now(self) -> float:
        """See :meth:`blending.BlendForward.now`."""
        return time.perf_counter()

    def affordable_rows(self, rows: int) -> int:
        """See :meth:`blending.BlendForward.affordable_rows`."""
        return rows

    def place_exact(self, kv: torch.Tensor) -> None:
        """Copy the KV of the first tokens, ``[layers, 2, tokens, kv_heads, head_dim]``, computed at these positions."""
        self._kv[:, :, : kv.shape[2]] = kv

    def place(self, chunk: ChunkKV, offset: int, length: int, start: int) -> None:
        """Copy ``length`` tokens of a chunk, from its ``offset`` on, to positions ``start ..``, keys shifted there."""
        target = self._kv[:, :, start : start + length]
        old_start = chunk.start + offset
        shift = shift_table(self._rotary(old_start, length), self._rotary(start, length))
        # On a CPU one layer at a time: the float32 copies stay in its cache. On a GPU it is launches that take time.
        at_once = 1 if target.device.type == "cpu" else self.num_layers
        for first in range(0, self.num_layers, at_once):
            layers = slice(first, first + at_once)
            scales = None if chunk.scales is None else chunk.scales[layers].to(target.device)
            source = chunk.kv[layers, :, offset : offset + length].to(target.device)
            keys, target[layers, 1] = decode(source, scales, target.dtype).unbind(1)
            if old_start == start:
                target[layers, 0] = keys
            else:
                rotate_keys(keys, shift, out=target[layers, 0])

    def deviations(self, rows: torch.Tensor, layer: int, keys: bool = False) -> torch.Tensor:
        """See :meth:`blending.BlendForward.deviations`."""
        forward_pass = _Pass(self._kv, rows, deviation_layer=layer, deviation_keys=keys)
        with contextlib.suppress(_Stop):
            self._run(forward_pass)
        assert forward_pass.deviations is not None
        return forward_pass.deviations.cpu()

    def question_attention(
        self, rows: torch.Tensor, weights: torch.Tensor, layers: range, unread: torch.Tensor
    ) -> torch.Tensor:
        """See :meth:`blending.BlendForward.question_attention`."""
        forward_pass = _Pass(self._kv, rows, question_weights=weights, question_layers=layers, unread=unread)
        with contextlib.suppress(_Stop):
            self._run(forward_pass)
        self._extend_exact(rows)
        return (forward_pass.given / len(layers)).cpu()

    def recompute(self, rows: torch.Tensor) -> torch.Tensor:
        """See :meth:`blending.BlendForward.recompute`."""
        logits = self._run(_Pass(self._kv, rows))
        self._extend_exact(rows)
        return logits

    def keys(self) -> torch.Tensor:
        """The keys of all layers, ``[layers, capacity, kv_heads, head_dim]``."""
        return self._kv[:, 0]

    def squared_distances(self, other: PromptForward, positions: torch.Tensor) -> NDArray[np.float32]:
        """How far KV at some positions is from that of the same prompt in another buffer.

        Args:
            other: The same prompt.
            positions: int64 ``[rows]``.

        Returns:
            float32 ``[layers, 2, rows]``: squared L2 distances over all heads, of keys and of values.
        """
        rows = positions.to(self._kv.device)
        found = [
            [_squared_distances(mine[rows], theirs[rows]) for mine, theirs in zip(layer, of_other, strict=True)]
            for layer, of_other in zip(self._kv, other._kv, strict=True)
        ]
        distances: NDArray[np.float32] = torch.stack([torch.stack(both) for both in found]).cpu().numpy()
        return distances

    def decode(self, token_id: int) -> torch.Tensor:
        """Append a token and run it; returns the float32 logits ``[vocabulary]`` after it."""
        self._token_ids = torch.cat([self._token_ids, self._token_ids.new_tensor([token_id])])
        return self.recompute(torch.tensor([len(self._token_ids) - 1]))

    def look_ahead(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Run tokens that would come next, without appending them: what is run later overwrites their KV.

        Args:
            token_ids: int64 ``[tokens]`` on the model's device, at least one.

        Returns:
            float32 ``[tokens, vocabulary]``: the logits after each.
        """
        known = self._token_ids
        self._token_ids = torch.cat([known, token_ids])
        try:
            rows = torch.arange(len(known), len(self._token_ids))
            return self._run_for_logits(_Pass(self._kv, rows), len(rows))
        finally:
            self._token_ids = known

    def _run(self, forward_pass: _Pass) -> torch.Tensor:
        """Run; returns the float32 logits ``[vocabulary]`` after the last row."""
        return self._run_for_logits(forward_pass, 1)[-1]

    def _run_for_logits(self, forward_pass: _Pass, count: int) -> torch.Tensor:
        """Run; returns the float32 logits ``[count, vocabulary]`` after the last ``count`` rows."""
        rows = forward_pass.rows
        output = self._model(
            input_ids=self._token_ids[rows][None],
            position_ids=rows[None] + self._first_position,
            past_key_values=forward_pass,
            use_cache=True,
            logits_to_keep=count,
            row_pass=forward_pass,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _extend_exact(self, rows: torch.Tensor) -> None:
        """Rows that follow the exact tokens without a gap have become exact."""
        following = rows[rows >= self.exact_tokens]
        in_order = following == torch.arange(self.exact_tokens, self.exact_tokens + len(following))
        self.exact_tokens += int(in_order.long().cumprod(0).sum())

    def _rotary(self, start: int, length: int) -> RotaryTable:
        """The model's own rotation of some positions."""
        positions = torch.arange(start, start + length, device=self._kv.device)
        decoder: Any = self._model.get_decoder()  # type: ignore[no-untyped-call]
        if not hasattr(decoder, "rotary_emb"):
            raise UnsupportedModelError("its positions are not rotary (RoPE), so its keys can't be moved to others")
        cos, sin = decoder.rotary_emb(self._kv[0, 0, :1], positions[None])
        half = cos.shape[-1] // 2
        return RotaryTable(cos[0, :, :half].float(), sin[0, :, :half].float())


class _Pass(Cache):
    """One forward pass over some rows: handed to the model as its KV cache, and to its attention layers.

    Args:
        kv: The prompt's KV buffer.
        rows: int64 positions, ascending.
        deviation_layer: Stop at this layer once its deviations are known.
        deviation_keys: Whether keys count in them, too.
        question_weights: float32: what the last so many rows count, which are the question, whose attention is watched;
            nothing is computed that only logits would need.
        question_layers: The layers where it counts.
        unread: int64 positions, ascending, that no row sees.
    """

    def __init__(
        self,
        kv: torch.Tensor,
        rows: torch.Tensor,
        *,
        deviation_layer: int | None = None,
        deviation_keys: bool = False,
        question_weights: torch.Tensor | None = None,
        question_layers: range = range(0),
        unread: torch.Tensor | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.rows = rows.to(kv.device)
        self.deviations: torch.Tensor | None = None
        end = int(rows[-1]) + 1
        # What rows see, and their places in it: attention asks for no more, since keys stand where they are used.
        self._seen: slice | torch.Tensor = slice(end)
        self._places = self.rows
        if unread is not None and len(unread):
            is_seen = torch.ones(end, dtype=torch.bool)
            is_seen[unread] = False
            self._seen = is_seen.nonzero().flatten().to(kv.device)
            self._places = torch.searchsorted(self._seen, self.rows)
        self._kv = kv
        self._deviation_layer = deviation_layer
        self._deviation_keys = deviation_keys
        self._question_layers = question_layers
        self.given = torch.zeros(end, dtype=torch.float32, device=kv.device)
        self._weights = torch.empty(0) if question_weights is None else question_weights.to(kv.device)
        self._attention: dict[int | None, RowAttention] = {}  # by sliding window

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows' KV (``[1, kv_heads, rows, head_dim]``) at their positions; returns that of all positions."""
        keys, values = self._kv[layer_idx]
        fresh_keys, fresh_values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        if layer_idx == self._deviation_layer:  # before the fresh KV takes the cached KV's place
            self.deviations = _squared_distances(fresh_values, values[self.rows])
            if self._deviation_keys:
                self.deviations += _squared_distances(fresh_keys, keys[self.rows])
        keys[self.rows] = fresh_keys
        values[self.rows] = fresh_values
        if layer_idx == self._deviation_layer:
            raise _Stop
        return keys[self._seen].transpose(0, 1)[None], values[self._seen].transpose(0, 1)[None]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of the rows over what they see: ``[1, heads, rows, head_dim]``."""
        context = len(self.rows) - len(self._weights)
        parts = []
        if context:
            if window not in self._attention:
                self._attention[window] = RowAttention(self._places[:context], query.dtype, window)
            parts.append(self._attention[window](query[:, :, :context], key, value, scale))
        if len(self._weights):
            where = self._places[context:]
            asked, given = attend_and_watch(query[:, :, context:], key, value, where, self._weights, scale)
            parts.append(asked)
            if layer in self._question_layers:
                self.given[self._seen] += given
            if layer == len(self._kv) - 1:
                raise _Stop
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _squared_distances(fresh: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """Of ``[rows, kv_heads, head_dim]`` each; float32 ``[rows]``."""
    return (fresh.float() - cached.float()).square().sum(dim=(1, 2))


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_pass: _Pass,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function transformers calls in every attention layer. The mask is None: positions say what a row sees."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"its attention uses {name}, which row attention does not compute")
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = row_pass.attend(layer, query, key, value, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention)
