"""Which vLLM configurations can be blended; what can't is refused at start with the reason."""

from __future__ import annotations

from typing import Any

from cacheblend_rag.errors import UnsupportedModelError


def check_supported(vllm_config: Any) -> None:
    """Refuse what blending can't handle, as far as the configuration tells. The loaded model is probed later.

    Args:
        vllm_config: The engine's ``vllm.config.VllmConfig``.

    Raises:
        UnsupportedModelError: with the reason.
    """
    reason = unsupported_reason(vllm_config)
    if reason:
        raise UnsupportedModelError(
            f"model {vllm_config.model_config.model!r} can't be blended: {reason}; "
            'serve it without CacheBlend, or plainly with on_unsupported="prefill"'
        )


def unsupported_reason(vllm_config: Any) -> str | None:
    """Why this configuration can't be blended, or None."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    window = model.get_sliding_window()
    if model.runner_type != "generate":
        return f"it is run as a {model.runner_type} model, not for generation"
    if model.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if model.use_mla:
        return "multi-head latent attention (MLA) is not supported"
    if model.is_hybrid or model.is_attention_free:
        return "it has layers without attention (hybrid or state space)"
    if model.uses_mrope or getattr(model, "uses_xdrope_dim", 0):
        return "multi-dimensional RoPE (M-RoPE) is not supported"
    if _slides(model.hf_text_config) and window is not None and window < model.max_model_len:
        return f"its sliding window of {window} tokens is shorter than max_model_len ({model.max_model_len})"
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is not supported"
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "context parallelism is not supported"
    if parallel.data_parallel_size > 1 and model.is_moe:
        return "a mixture of experts under data parallelism runs its ranks in lock-step: use one replica a process"
    if vllm_config.speculative_config is not None:
        return "speculative decoding is not supported"
    if vllm_config.lora_config is not None:
        return "LoRA is not supported"
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3"):
        return f"a KV cache of {cache.cache_dtype} is not supported: take auto or fp8"
    if getattr(cache, "calculate_kv_scales", False):
        return "KV scales that are calculated from the first prompt (calculate_kv_scales) are not supported"
    return None


def _slides(config: Any) -> bool:
    """Whether the model's sliding window is on: Qwen2 configs name one that is off."""
    if getattr(config, "use_sliding_window", None) is False:
        return False
    kinds = getattr(config, "layer_types", None)
    return kinds is None or any("sliding" in kind or "chunked" in kind for kind in kinds)
