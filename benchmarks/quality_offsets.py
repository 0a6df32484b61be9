"""What chunks read alone have wrong on average, taken off their KV: an idea that is measured, not in the product.

Part of the difference between a chunk's KV read alone and read amid a prompt is the same in all prompts: for each layer
and head one vector for keys (before their rotation) and one for values. It is found on some prompts, and added to the
KV of chunks before others read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cacheblend_rag import BlendConfig
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.engines.transformers_forward import PromptForward
from cacheblend_rag.layout import PromptLayout
from cacheblend_rag.rope import RotaryTable, rotate_keys


@torch.inference_mode()
def find_offsets(engine: TransformersEngine, prompts: Sequence[tuple[str, list[str]]]) -> torch.Tensor:
    """The mean of full prefill's KV minus reused KV, float32 ``[layers, 2, kv_heads, head_dim]``, keys not rotated.

    Args:
        engine: Nothing is warm in it, before or after.
        prompts: Prompts with the passages in them.
    """
    reader, found, tokens = engine._reader, None, 0
    for prompt, passages in prompts:
        engine.warm(passages)
        ids = engine._prompt_ids(prompt)
        full, reused = (
            reader.read_prompt(ids, len(ids), BlendConfig(mode=mode, recompute_ratio=0.0)).forward  # type: ignore[arg-type]
            for mode in ("off", "blend")
        )
        primer = np.asarray(engine.scope.primer_ids, np.int32)
        matched = PromptLayout.of_prompt(ids, engine.library.match(ids), primer).matched
        off = (full._kv[:, :, matched].float() - reused._kv[:, :, matched].float()).cpu()
        off[:, 0] = torch.stack([_rotated(full, keys, matched, -1) for keys in off[:, 0]])
        found = off.sum(dim=2) if found is None else found + off.sum(dim=2)
        tokens += len(matched)
        engine.evict(passages)
    assert found is not None
    return found / tokens


@torch.inference_mode()
def add_offsets(engine: TransformersEngine, passages: list[str], offsets: torch.Tensor) -> None:
    """Add them to the KV of warm passages, where it is in the engine's memory."""
    rotation = engine._reader._forward(np.zeros(1, np.int32), engine._loaded.empty_kv(1))
    for key in set(engine.chunk_keys(passages)):
        chunk = engine.library.read(key)
        assert chunk is not None
        positions = torch.arange(chunk.start, chunk.start + len(chunk.ids))
        for layer, (keys, values) in enumerate(offsets):
            rotated = _rotated(rotation, keys.expand(len(positions), -1, -1), positions, 1)
            chunk.kv[layer, 0] = (chunk.kv[layer, 0].float() + rotated).to(chunk.kv.dtype)
            chunk.kv[layer, 1] = (chunk.kv[layer, 1].float() + values).to(chunk.kv.dtype)


def _rotated(forward: PromptForward, keys: torch.Tensor, positions: torch.Tensor, direction: int) -> torch.Tensor:
    """Keys (``[tokens, kv_heads, head_dim]`` on the CPU) rotated to some positions, or back from them (-1)."""
    whole = forward._rotary(0, int(positions[-1]) + 1)
    table = RotaryTable(whole.cos.cpu()[positions], direction * whole.sin.cpu()[positions])
    rotated = torch.empty_like(keys, memory_format=torch.contiguous_format)
    rotate_keys(keys, table, out=rotated)
    return rotated
