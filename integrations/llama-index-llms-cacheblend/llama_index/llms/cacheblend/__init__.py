"""CacheBlend for LlamaIndex: a model, a transformation, a pipeline and a postprocessor around one engine."""

from llama_index.llms.cacheblend.base import CacheBlendLLM
from llama_index.llms.cacheblend.pipeline import CacheBlendPipeline
from llama_index.llms.cacheblend.postprocessor import CacheBlendPostprocessor
from llama_index.llms.cacheblend.transform import CacheBlendTransform

__all__ = ["CacheBlendLLM", "CacheBlendPipeline", "CacheBlendPostprocessor", "CacheBlendTransform"]
