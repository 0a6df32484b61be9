"""The way in: a model and a chunk store, as one engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from cacheblend_rag.store import ChunkStore


def load_engine(
    model: str | os.PathLike[str],
    *,
    engine: str = "transformers",
    store: str | os.PathLike[str] | ChunkStore | None = None,
    blend: BlendConfig | None = None,
    dtype: str = "auto",
    device: str = "auto",
    primer: str | None = None,
    namespace: str = "default",
    base_url: str | None = None,
    engine_args: Mapping[str, Any] | None = None,
) -> Engine:
    """Load a model and open a chunk store.

    Args:
        model: Directory or hub id of a causal language model.
        engine: What runs it: ``"transformers"``, in this process.
        store: Where chunk KV is kept: a directory, an open store (see ``cacheblend_rag.store.open_store`` for size
            limits), or None for memory only. The engine closes it.
        blend: Defaults of every request.
        dtype: ``"auto"`` (the checkpoint's; float32 on a CPU that has no bfloat16 arithmetic), ``"float32"``,
            ``"float16"`` or ``"bfloat16"``.
        device: ``"auto"`` (the GPU if there is one) or a torch device such as ``"cuda:0"``.
        primer: Text every chunk is prefilled behind; its KV is dropped. None: a constant passage. Give the system
            prefix that all prompts begin with to have that prefix, and the first chunk, reused exactly. Another primer,
            other chunks.
        namespace: Tenant: chunks of one namespace are never found from another.
        base_url: Address of a server; the transformers engine has none.
        engine_args: Further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ConfigError: a bad setting, or no such model.
        UnsupportedModelError: the model can't be blended.
        StoreError: the store can't be opened.
    """
    if engine != "transformers":
        raise ConfigError(f"unknown engine {engine!r}: known is transformers")
    if base_url is not None:
        raise ConfigError(
            "base_url is the address of a server, but the transformers engine runs in this process: leave it out"
        )
    from cacheblend_rag.engines.transformers import TransformersEngine
    from cacheblend_rag.store import open_store

    chunk_store = open_store(store) if store is None or isinstance(store, str | os.PathLike) else store
    return TransformersEngine(
        os.fspath(model),
        store=chunk_store,
        blend=blend or BlendConfig(),
        dtype=dtype,
        device=device,
        primer=primer,
        namespace=namespace,
        engine_args=engine_args or {},
    )
