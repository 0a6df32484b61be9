"""CacheBlend for retrieval-augmented generation: chunk KV from ingestion, reused at query time in any order.

from cacheblend_rag import load_engine

engine = load_engine("path-or-hub-id", store="kv-store")
engine.warm(["a chunk", "another chunk"])
print(engine.generate("... a chunk ... another chunk ... question").text)
"""

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.base import Engine, SamplingParams
from cacheblend_rag.errors import (
    CacheBlendError,
    ChunkTooLongError,
    ConfigError,
    IngestError,
    PolicyError,
    PromptTooLongError,
    ServerError,
    StoreError,
    UnsupportedModelError,
)
from cacheblend_rag.loading import load_engine
from cacheblend_rag.stats import BlendStats, Generation, StreamPiece, WarmReport

__version__ = "0.1.0"

__all__ = [
    "BlendConfig",
    "BlendStats",
    "CacheBlendError",
    "ChunkTooLongError",
    "ConfigError",
    "Engine",
    "Generation",
    "IngestError",
    "PolicyError",
    "PromptTooLongError",
    "SamplingParams",
    "ServerError",
    "StoreError",
    "StreamPiece",
    "UnsupportedModelError",
    "WarmReport",
    "load_engine",
]
