"""Loads a transformers model."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cacheblend_rag.chunks import ModelFingerprint
from cacheblend_rag.engines.fingerprint import fingerprint_model
from cacheblend_rag.engines.model_files import first_line, load_config, load_tokenizer, resolve_model
from cacheblend_rag.engines.transformers_probe import probe_model
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.memory_plan import MemoryPlan, explained, free_bytes, gigabytes, weight_bytes

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that can be blended.

    Attributes:
        model: The model, in evaluation mode, its attention implementation set to ours.
        tokenizer: Its tokenizer.
        fingerprint: What it is.
        kv_shape: ``(layers, kv_heads, head_dim)``.
        context_window: Most tokens of prompt plus answer.
        full_attention_tokens: Up to this many tokens every token sees all before it under one set of RoPE frequencies;
            longer requests are served without blending.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    fingerprint: ModelFingerprint
    kv_shape: tuple[int, int, int]
    context_window: int
    full_attention_tokens: int

    def plan_memory(self, chunks: int) -> MemoryPlan:
        """What is needed of the device's memory, beside ``chunks`` bytes of the host's for chunk KV."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return MemoryPlan(
            weights=sum(tensor.nbytes for tensor in tensors),
            token=2 * math.prod(self.kv_shape) * self.model.dtype.itemsize,
            context_window=self.context_window,
            chunks=chunks,
            free=free_bytes(self.model.device),
            on_host=self.model.device.type == "cpu",
        )

    def empty_kv(self, tokens: int) -> torch.Tensor:
        """An uninitialised KV buffer ``[layers, 2, tokens, kv_heads, head_dim]``."""
        layers, kv_heads, head_dim = self.kv_shape
        shape = (layers, 2, tokens, kv_heads, head_dim)
        if self.model.device.type == "cpu" and tokens:
            # NumPy asks the system for huge pages where torch does not: a fraction of the page faults.
            size = math.prod(shape) * self.model.dtype.itemsize
            return torch.from_numpy(np.empty(size, np.uint8)).view(self.model.dtype).view(shape)
        return torch.empty(shape, dtype=self.model.dtype, device=self.model.device)


def load_model(
    name: str, *, dtype: str, device: str, chat_template: str | None, model_args: dict[str, Any]
) -> LoadedModel:
    """Load a causal LM from a directory or a hub id.

    Args:
        name: Directory or hub id.
        dtype: ``"auto"`` (the checkpoint's; float32 on a CPU without bfloat16 arithmetic) or a torch dtype's name.
        device: ``"auto"`` (the GPU if there is one) or a torch device.
        chat_template: In place of the tokenizer's own: the Jinja template, or a file that holds it.
        model_args: Further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ConfigError: there is no such model, dtype or device.
        UnsupportedModelError: it can't be blended; the message gives the reason.
    """
    directory = resolve_model(name)
    config = load_config(name, directory)
    tokenizer = load_tokenizer(name, directory, chat_template)
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, config, torch_device)
    is_plain = not model_args and getattr(config, "quantization_config", None) is None
    needed, free = weight_bytes(directory, torch_dtype) if is_plain else None, free_bytes(torch_device)
    if needed is not None and free is not None and needed > free:
        logger.warning(
            "the weights of %s take %s as %s, and %s are free on %s: free some there, or change device, dtype or model",
            name,
            gigabytes(needed),
            str(torch_dtype).removeprefix("torch."),
            gigabytes(free),
            torch_device,
        )
    with explained(f"loading {name!r} on {torch_device}", "free some there, or change device, dtype or the model"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch_dtype, **model_args)
        torch.nn.Module.to(model, torch_device).train(False)
    fingerprint = fingerprint_model(name, directory, config, tokenizer, str(torch_dtype).removeprefix("torch."))
    traits = probe_model(model)
    context_window = int(config.max_position_embeddings)
    limits = [context_window, traits.window, _rope_limit(config)]
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        kv_shape=traits.kv_shape,
        context_window=context_window,
        full_attention_tokens=min(limit for limit in limits if limit is not None),
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} can't be used: {first_line(error)}") from error


def _dtype(dtype: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        checkpoint = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        emulated = device.type == "cpu" and not (cpu.get("amx_bf16") or cpu.get("avx512_bf16"))
        return torch.float32 if emulated else checkpoint
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(_DTYPES)}, not {dtype!r}")
    return _DTYPES[dtype]


def _rope_limit(config: PreTrainedConfig) -> int | None:
    """Tokens up to which the RoPE frequencies stay the same (longrope and dynamic scaling change them beyond)."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    return None
