"""Finds out on a model itself whether it can be blended.

What a blend relies on is tested, not looked up by name: passes over all rows and over rows with gaps must give the
logits of stock attention, and keys of layer 0 shifted by some positions must be those computed there. A model with
attention or RoPE of another kind fails one of them and is refused with the reason.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from cacheblend_rag.chunks import ChunkKV, ChunkScope, ModelFingerprint
from cacheblend_rag.engines.transformers_forward import ATTENTION_NAME, PromptForward
from cacheblend_rag.errors import UnsupportedModelError

# Long enough for rows with gaps between them, short enough to cost nothing.
_TOKENS = 24
_SHIFT = 7
# Shares of the largest logit or key. Below is rounding; a wrong mask or rotation gives errors near 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclasses.dataclass(frozen=True)
class ModelTraits:
    """What the probe learnt.

    Attributes:
        kv_shape: ``(layers, kv_heads, head_dim)``.
        window: The smallest sliding window of its layers, in tokens; None if all attend fully.
    """

    kv_shape: tuple[int, int, int]
    window: int | None


@torch.inference_mode()
def probe_model(model: PreTrainedModel) -> ModelTraits:
    """Probe a model and leave it with our attention implementation.

    Raises:
        UnsupportedModelError: it can't be blended; the message gives the reason.
    """
    try:
        return _probe(model)
    except UnsupportedModelError as error:
        reason = str(error)
    except Exception as error:  # whatever foreign attention code does with rows it doesn't expect
        reason = f"it can't be run on chosen tokens ({(str(error) or repr(error)).splitlines()[0]})"
    raise UnsupportedModelError(f"model type {model.config.model_type!r} can't be blended: {reason}")


def _probe(model: PreTrainedModel) -> ModelTraits:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(model.config.vocab_size, (_TOKENS,), generator=generator).to(model.device)
    cache = DynamicCache(config=model.config)
    stock = model(input_ids=token_ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    expected = stock.logits[0, -1].float()
    kv_shape = _kv_shape(cache)
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]

    model.set_attn_implementation(ATTENTION_NAME)
    layers, *head_shape = kv_shape
    kv = torch.full((layers, 2, _TOKENS + _SHIFT, *head_shape), torch.nan, dtype=model.dtype, device=model.device)
    forward = PromptForward(model, token_ids, kv)
    passes = {
        "row attention": forward.recompute(torch.arange(_TOKENS)),
        "a pass over some tokens": forward.recompute(torch.arange(1, _TOKENS, 2)),
    }
    tolerance = _TOLERANCE[model.dtype]
    for what, logits in passes.items():
        miss = _relative(logits, expected)
        if not miss < tolerance:  # NaN too
            raise UnsupportedModelError(f"{what} changes its logits by {miss:.1%}")
    miss = _shift_error(model, token_ids, kv)
    if not miss < tolerance:
        raise UnsupportedModelError(f"its keys can't be shifted to other positions (error {miss:.1%})")
    return ModelTraits(kv_shape, min(windows, default=None))


def _kv_shape(cache: DynamicCache) -> tuple[int, int, int]:
    shapes = set()
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.shape != values.shape:
            raise UnsupportedModelError("not every layer caches keys and values of one shape")
        shapes.add((keys.shape[1], keys.shape[3]))
    if len(shapes) != 1:
        raise UnsupportedModelError("its layers differ in KV heads or head size")
    return (len(cache.layers), *shapes.pop())


def _shift_error(model: PreTrainedModel, token_ids: torch.Tensor, kv: torch.Tensor) -> float:
    scope = ChunkScope("probe", ModelFingerprint("", "", "", "", ""), ())
    chunk = ChunkKV("", scope, np.zeros(_TOKENS, np.int32), 0, kv[:, :, :_TOKENS].clone())
    padded = torch.cat([token_ids[:_SHIFT], token_ids])
    forward = PromptForward(model, padded, kv)
    forward.recompute(torch.arange(len(padded)))
    expected = kv[0, 0, _SHIFT:].float().clone()
    forward.place(chunk, 0, _TOKENS, _SHIFT)
    return _relative(kv[0, 0, _SHIFT:].float(), expected)


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
