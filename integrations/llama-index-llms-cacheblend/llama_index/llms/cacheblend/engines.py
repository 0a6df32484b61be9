"""Where the components of this package get their engine from: given, loaded, or opened again in another process."""

from __future__ import annotations

import contextlib
import inspect
import multiprocessing
import os
import pickle
import threading
from collections.abc import Mapping
from typing import Any, Self

from cacheblend_rag import BlendConfig, load_engine
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from llama_index.core.schema import BaseComponent
from pydantic import BaseModel, PrivateAttr

# "blend" has defaults of its own in each component.
LOAD_SETTINGS = tuple(name for name in inspect.signature(load_engine).parameters if name not in ("engine", "blend"))

_opened: dict[tuple[int, bytes], Engine] = {}  # by process: a forked one must not use its parent's
_opening = threading.Lock()


class EngineRef:
    """An engine. Pickled as the settings that made it, and opened again from them where it is first used after that.

    An engine can't be moved to another process, and opening one takes long and may fail: not a thing to do while
    unpickling, where a process pool would hang on it. A process opens equal settings once.

    Args:
        engine: What it refers to.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._settings = b""

    @property
    def engine(self) -> Engine:
        """The engine, opened if it isn't yet."""
        if self._engine is None:
            self._engine = _open(self._settings)
        return self._engine

    @property
    def is_copy(self) -> bool:
        """Whether this came here from another process, which has the original."""
        return bool(self._settings)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __getstate__(self) -> bytes:
        """The pickled settings.

        Raises:
            ConfigError: the engine can't be opened a second time.
        """
        if self._settings or self._engine is None:
            return self._settings
        settings = self._engine.settings
        kind = (settings or {}).get("engine", "transformers")
        if settings is None:
            raise ConfigError(
                "this engine was not made by load_engine, so other processes can't open it: use one worker"
            )
        if kind == "vllm":
            raise ConfigError(
                "engine 'vllm' holds the accelerator's memory in this process, so other processes can't open it: "
                "use one worker, or serve the model and use engine 'server'"
            )
        if kind == "transformers" and settings.get("store") is None:
            raise ConfigError(
                "this engine keeps chunks in memory only, where other processes can't add any: give it store="
            )
        try:
            return pickle.dumps(dict(settings))
        except Exception as error:
            raise ConfigError(
                f"other processes can't open this engine, its settings can't be sent to them ({error}): "
                "give the store as a directory, or use one worker"
            ) from error

    def __setstate__(self, settings: bytes) -> None:
        self._engine = None
        self._settings = settings


class HoldsEngine(BaseComponent):
    """A LlamaIndex component around an engine."""

    _ref: EngineRef = PrivateAttr()

    def __init__(self, engine: Engine, /, **fields: Any) -> None:
        super().__init__(**fields)
        self._ref = EngineRef(engine)

    @property
    def engine(self) -> Engine:
        """The engine; components built around the same one share its chunk store."""
        return self._ref.engine

    def __getstate__(self) -> dict[str, Any]:
        self._ref.__getstate__()  # what can't be pickled is an error here; LlamaIndex would leave it out and go on
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        BaseModel.__setstate__(self, state)  # LlamaIndex would call __init__


def obtain_engine(
    owner: str, engine: Engine | str, load: dict[str, Any], blend: BlendConfig | Mapping[str, Any] | None = None
) -> Engine:
    """The engine given, or a new one.

    Args:
        owner: Who needs it, for messages.
        engine: An engine, or the kind to load.
        load: Settings for loading one.
        blend: Its defaults, if it is loaded.

    Raises:
        ConfigError: settings that don't go together, or as from ``load_engine``.
    """
    if not isinstance(engine, str):
        if load:
            raise ConfigError(f"{', '.join(load)}: decided when the engine was loaded, not where it is wrapped")
        return engine
    if load.get("model") is None:
        raise ConfigError(f"{owner} needs model=<path or hub id>, or engine=<an engine that exists>")
    defaults = override(BlendConfig(), blend)
    return load_engine(
        load.pop("model"),
        engine=engine,
        blend=None if engine == "server" else defaults,  # a server has defaults of its own
        **load,
    )


def override(blend: BlendConfig, change: BlendConfig | Mapping[str, Any] | None) -> BlendConfig:
    """Settings of a blend, some or all replaced."""
    return change if isinstance(change, BlendConfig) else blend.with_overrides(change)


def split_settings(settings: dict[str, Any], known: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments, as those that load an engine and the others.

    Raises:
        ConfigError: one that is neither among ``known`` nor loads an engine.
    """
    refuse_unknown(settings, [*LOAD_SETTINGS, *known])
    load = {name: value for name, value in settings.items() if name in LOAD_SETTINGS}
    return load, {name: value for name, value in settings.items() if name not in LOAD_SETTINGS}


def refuse_unknown(settings: Mapping[str, Any], known: list[str]) -> None:
    """Raise ConfigError for the first setting that isn't known."""
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}: known are {', '.join(known)}")


def _open(settings: bytes) -> Engine:
    with _opening:
        key = (os.getpid(), settings)
        if key not in _opened:
            if multiprocessing.parent_process() is not None:
                _use_one_thread()
            arguments = pickle.loads(settings)
            _opened[key] = load_engine(arguments.pop("model"), **arguments)
        return _opened[key]


def _use_one_thread() -> None:
    """Workers are there to use one core each, and a forked one has its parent's thread pools without the threads."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
