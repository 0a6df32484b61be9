"""The way in: a model and a chunk store, as one engine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.guard import check_share

if TYPE_CHECKING:
    from cacheblend_rag.store import ChunkStore

_ENGINES = ("transformers", "vllm", "server")
_P = ParamSpec("_P")


def _remembering(load: Callable[_P, Engine]) -> Callable[_P, Engine]:
    """Keeps the arguments as the engine's ``settings``."""

    @functools.wraps(load)
    def remember(*args: _P.args, **kwargs: _P.kwargs) -> Engine:
        engine = load(*args, **kwargs)
        engine.settings = {**dict(zip(["model"], args, strict=False)), **kwargs}
        return engine

    return remember


@_remembering
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
    codec: str = "raw",
    base_url: str | None = None,
    chat_template: str | os.PathLike[str] | None = None,
    guard: float | None = None,
    engine_args: Mapping[str, Any] | None = None,
) -> Engine:
    """Load a model and open a chunk store.

    Args:
        model: Directory or hub id of a causal language model.
        engine: What runs it: ``"transformers"``, in this process; ``"vllm"``, vLLM's engine in this process;
            ``"server"``, a vLLM server at ``base_url``.
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
        codec: How chunk KV is kept: ``"raw"``, bit for bit, or ``"fp8"``, as 8-bit floats, in half the bytes of
            bfloat16. Another codec, other chunks.
        base_url: Address of the server, such as ``"http://localhost:8000/v1"``. It has loaded model, store and primer
            itself: what is given here of them must be what it has, or None.
        chat_template: In place of the model's own: a Jinja template, or a file that holds it.
        guard: Share of the blended answers that are compared with full prefill in the background, such as 0.02. Where
            they are too far from it, more is recomputed, or blending is turned off: see :mod:`cacheblend_rag.guard`.
        engine_args: Further arguments of ``AutoModelForCausalLM.from_pretrained``, of ``vllm.EngineArgs`` (also
            ``on_unsupported="prefill"``, and ``gpu_bytes``: most bytes of chunks kept in the GPU's memory too), or of
            ``openai.OpenAI`` (``api_key``, ``timeout``, ``max_retries``).

    Raises:
        ConfigError: a bad setting, or no such model.
        UnsupportedModelError: the model can't be blended.
        StoreError: the store can't be opened.
    """
    if guard is not None:
        check_share(guard)
    if engine not in _ENGINES:
        raise ConfigError(f"unknown engine {engine!r}: known are {', '.join(_ENGINES)}")
    if engine == "server":
        try:
            from cacheblend_rag.engines.server import ServerEngine
        except ImportError as error:
            raise ConfigError(
                f"the server engine needs the openai package ({error}): pip install 'cacheblend-rag[server]'"
            ) from error
        if base_url is None:
            raise ConfigError('engine "server" needs base_url, such as "http://localhost:8000/v1"')
        for name, value in {"store": store, "primer": primer, "chat_template": chat_template}.items():
            if value is not None:
                raise ConfigError(f"{name} is the server's to set, where it is started: leave it out")
        for name, value, default in (("dtype", dtype, "auto"), ("device", device, "auto"), ("codec", codec, "raw")):
            if value != default:
                raise ConfigError(f"{name} is the server's to set, where it is started: leave it out")
        loaded: Engine = ServerEngine(
            os.fspath(model), base_url=base_url, blend=blend, namespace=namespace, client_args=engine_args or {}
        )
        return _watched(loaded, guard)
    if base_url is not None:
        raise ConfigError(f"base_url is the address of a server, but the {engine} engine runs here: leave it out")
    settings: dict[str, Any] = {
        "blend": blend or BlendConfig(),
        "dtype": dtype,
        "device": device,
        "primer": primer,
        "namespace": namespace,
        "codec": codec,
        "chat_template": None if chat_template is None else os.fspath(chat_template),
        "engine_args": engine_args or {},
    }
    if engine == "vllm":
        from cacheblend_rag.engines.vllm import VllmEngine

        loaded = VllmEngine(
            os.fspath(model), store=os.fspath(store) if isinstance(store, os.PathLike) else store, **settings
        )
        return _watched(loaded, guard)
    from cacheblend_rag.engines.transformers import TransformersEngine
    from cacheblend_rag.store import open_store

    chunk_store = open_store(store) if store is None or isinstance(store, str | os.PathLike) else store
    return _watched(TransformersEngine(os.fspath(model), store=chunk_store, **settings), guard)


def _watched(loaded: Engine, guard: float | None) -> Engine:
    if guard is not None:
        loaded.watch(guard)
    return loaded
