"""The model that a vLLM worker has loaded, as the blend needs it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention

from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.errors import UnsupportedModelError
from cacheblend_rag.rope import RotaryTable
from cacheblend_rag.vllm.compat import native_operators
from cacheblend_rag.vllm.paged_kv import PagedKV

if TYPE_CHECKING:
    from cacheblend_rag.vllm.kernel_passes import KernelPasses

# Others write KV inside their kernels, or plan for no more sequences a pass than vLLM schedules requests.
ATTENTION_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")


class PagedModel:
    """Model, attention layers, paged KV and RoPE table of one worker.

    Args:
        model: The loaded ``torch.nn.Module``.
        vllm_config: The engine's configuration.
        kv_cache_config: Of this worker.

    Attributes:
        layers: Attention layers in order.
        kv: Their KV.
        tp: The tensor-parallel group.
        total_kv_heads: KV heads of the whole model.
        cos_sin: The model's own rotation, ``[positions, rotary_dim]``, cosines first.
        max_rows: Most rows of one pass: what vLLM planned its memory for.
        native_operators: What :func:`compat.fast_operators` needs.
        kernel_passes: The fast way to run scattered rows, where there is one.

    Raises:
        UnsupportedModelError: it can't be blended; the message gives the reason.
    """

    def __init__(self, model: torch.nn.Module, vllm_config: Any, kv_cache_config: Any) -> None:
        self.kernel_passes: KernelPasses | None = None
        self.model = model
        self.native_operators = native_operators(model)
        self.vllm_config = vllm_config
        self.tp = get_tp_group()
        self.total_kv_heads: int = vllm_config.model_config.get_total_num_kv_heads()
        self.max_rows: int = vllm_config.scheduler_config.max_num_batched_tokens
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise UnsupportedModelError("its layers keep KV of different kinds")
        self.layers = _attention_layers(model, groups[0].layer_names, vllm_config.model_config.max_model_len)
        spec = groups[0].kv_cache_spec
        self.kv = PagedKV(self.layers, spec.block_size, kv_cache_config.num_blocks, vllm_config.model_config.dtype)
        self.layer_names = [layer.layer_name for layer in self.layers]
        self.cos_sin: torch.Tensor = _rotary(model).get_buffer("cos_sin_cache")
        builder = self.layers[0].get_attn_backend().get_builder_cls()
        with set_current_vllm_config(vllm_config):
            self.metadata_builder = builder(spec, self.layer_names, vllm_config, self.kv.device)

    def rotary_table(self, positions: torch.Tensor) -> RotaryTable:
        """The model's own rotation at some positions (int64 ``[tokens]``)."""
        cos, sin = self.cos_sin[positions].float().chunk(2, dim=-1)
        return RotaryTable(cos, sin)

    def local_heads(self) -> slice:
        """The KV heads of the whole model that this rank holds."""
        ranks, heads = self.tp.world_size, self.total_kv_heads
        first = self.tp.rank_in_group * heads // ranks  # with more ranks than heads, several hold the same one
        return slice(first, first + max(1, heads // ranks))

    def own_heads(self, chunk: ChunkKV) -> ChunkKV:
        """A chunk with the heads that this rank holds, of one with all heads."""
        if self.total_kv_heads == self.kv.num_kv_heads or chunk.kv.shape[3] != self.total_kv_heads:
            return chunk
        heads = self.local_heads()
        scales = None if chunk.scales is None else chunk.scales[:, :, heads].contiguous()
        return dataclasses.replace(chunk, kv=chunk.kv[:, :, :, heads].contiguous(), scales=scales)

    @property
    def is_first_rank(self) -> bool:
        """Whether this is the rank that writes chunks."""
        return bool(self.tp.rank_in_group == 0)

    def gather_heads(self, kv: torch.Tensor) -> torch.Tensor:
        """The KV of all ranks' heads: ``[..., total_kv_heads, head_dim]`` of ``[..., kv_heads, head_dim]``."""
        if self.tp.world_size == 1:
            return kv
        gathered: torch.Tensor = self.tp.all_gather(kv, dim=kv.dim() - 2)
        copies = max(1, self.tp.world_size // self.total_kv_heads)
        return gathered[..., ::copies, :]

    def agree(self, failed: list[bool]) -> list[bool]:
        """What failed on any rank: ranks that went on in different ways would never meet again."""
        if self.tp.world_size == 1 or not failed:
            return failed
        flags = torch.tensor(failed, dtype=torch.int32)
        torch.distributed.all_reduce(flags, group=self.tp.cpu_group)
        return [bool(flag) for flag in flags]


def find_model() -> torch.nn.Module:
    """The model of the worker that is calling this, from inside ``register_kv_caches``.

    vLLM hands its connectors no module. But the model runner that registers the caches is further up the stack, and has
    ``get_model``.

    Raises:
        UnsupportedModelError: it can't be found.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if callable(getattr(owner, "get_model", None)):
            model: Any = owner.get_model()  # type: ignore[union-attr]  # callable, as was just asked
            if isinstance(model, torch.nn.Module):
                return model
        frame = frame.f_back
    raise UnsupportedModelError("the model can't be reached in this vLLM")


def _attention_layers(model: torch.nn.Module, names: list[str], max_model_len: int) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, Attention) and module.layer_name in names]
    if len(layers) != len(names):
        raise UnsupportedModelError("not all of its layers are plain attention layers")
    for layer in layers:
        impl = layer.impl
        window = layer.sliding_window
        if layer.get_attn_backend().get_name() not in ATTENTION_BACKENDS:
            raise UnsupportedModelError(
                f"blending on the attention backend {layer.get_attn_backend().get_name()} is not tested: start vLLM "
                "with --attention-backend FLASH_ATTN or TRITON_ATTN"
            )
        if layer.kv_sharing_target_layer_name is not None:
            raise UnsupportedModelError("some of its layers share the KV of others")
        for name in ("alibi_slopes", "logits_soft_cap", "sinks"):
            value = getattr(impl, name, None)
            if value is not None and not (isinstance(value, int | float) and value == 0):
                raise UnsupportedModelError(f"its attention uses {name}")
        if window is not None and window < max_model_len:
            raise UnsupportedModelError(f"its layers attend over a sliding window of {window} tokens")
        if layer.head_size != layer.head_size_v:
            raise UnsupportedModelError("its keys and values differ in size")
    return layers


def _rotary(model: torch.nn.Module) -> torch.nn.Module:
    tables = {id(module): module for module in model.modules() if hasattr(module, "cos_sin_cache")}
    if len(tables) != 1:
        raise UnsupportedModelError(f"it has {len(tables)} rotary embeddings, not one that all layers share")
    rotary = next(iter(tables.values()))
    if not getattr(rotary, "is_neox_style", False):
        raise UnsupportedModelError("its RoPE rotates neighbouring dimensions (GPT-J style)")
    return rotary
