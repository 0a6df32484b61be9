"""The language model."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from cacheblend_rag import BlendConfig, load_engine
from cacheblend_rag.engines.base import Engine, SamplingParams
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import Generation as Answer
from cacheblend_rag.stats import StreamPiece
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseLLM
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict, Field, InstanceOf

_LOAD_SETTINGS = ("model", "store", "dtype", "device", "primer", "namespace", "base_url", "engine_args")
_SECRET_ENGINE_ARGS = {"api_key", "token"}
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")


class CacheBlendLLM(BaseLLM):
    """A model that reuses the KV of passages it has read before, wherever they stand in a prompt.

    Built from settings, named as in ``cacheblend_rag.load_engine``, or around an engine that exists::

        llm = CacheBlendLLM(model="path-or-hub-id", store="chunks/", max_tokens=64)
        llm = CacheBlendLLM(engine=engine, max_tokens=64)
        llm = CacheBlendLLM(model="name", engine="server", base_url="http://localhost:8000/v1", max_tokens=64)

    A call may override ``max_tokens``, ``temperature``, ``top_p``, ``top_k``, ``seed``, ``stop`` and single settings of
    ``blend``: ``llm.invoke(prompt, blend={"recompute_ratio": 0.3})``, or with ``bind``.

    ``generation_info`` of a generation, and of the last chunk of a stream, holds ``finish_reason``, ``stats`` (see
    ``cacheblend_rag.stats.BlendStats``) and ``ttft`` in seconds.

    Attributes:
        engine: The engine; a vector store and a retriever built around it share its chunk store.
        engine_settings: What the engine was loaded with; None if it was given.
        blend: How prompts with known passages are blended.
        max_tokens: Most tokens to generate.
        temperature: 0 is greedy.
        top_p: Keep the most likely tokens up to this total probability.
        top_k: Keep this many of the most likely tokens; 0 or -1 keeps all.
        seed: Makes sampling repeatable.
        stop: Strings that end the answer.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(exclude=True, repr=False)
    engine_settings: dict[str, Any] | None = Field(default=None, exclude=True, repr=False)
    blend: InstanceOf[BlendConfig] = Field(exclude=True)
    max_tokens: int = SamplingParams.max_tokens
    temperature: float = SamplingParams.temperature
    top_p: float = SamplingParams.top_p
    top_k: int = SamplingParams.top_k
    seed: int | None = None
    stop: list[str] | None = None

    def __init__(
        self,
        *,
        engine: Engine | str = "transformers",
        blend: BlendConfig | Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Load the engine, or take the one given.

        Args:
            engine: An engine, or the kind to load: ``"transformers"``, ``"vllm"``, or ``"server"`` with ``base_url``.
            blend: Settings of the blend; those not named are the engine's, or the defaults of ``BlendConfig``.
            settings: ``model``, ``store``, ``dtype``, ``device``, ``primer``, ``namespace``, ``base_url`` and
                ``engine_args`` as for ``cacheblend_rag.load_engine``, and the attributes of this class.

        Raises:
            ConfigError: an unknown or a bad setting, or one that an engine that exists can't take any more.
            UnsupportedModelError: the model can't be blended.
            StoreError: the chunk store can't be opened.
        """
        load = {name: settings.pop(name) for name in _LOAD_SETTINGS if name in settings}
        # Before the model is loaded: a typo shouldn't cost minutes.
        _refuse_unknown(settings, [*_LOAD_SETTINGS, *type(self).model_fields])
        SamplingParams(**{name: settings[name] for name in _SAMPLING if name in settings})
        if isinstance(engine, str):
            if load.get("model") is None:
                raise ConfigError("CacheBlendLLM needs model=<path or hub id>, or engine=<an engine that exists>")
            checked = _override(BlendConfig(), blend)
            load |= {name: os.fspath(value) for name, value in load.items() if isinstance(value, os.PathLike)}
            settings["engine_settings"] = {"engine": engine, **load}
            defaults = None if engine == "server" else checked  # a server has defaults of its own
            engine = load_engine(load.pop("model"), engine=engine, blend=defaults, **load)
        elif load:
            raise ConfigError(f"{', '.join(load)}: decided when the engine was loaded, not where it is wrapped")
        settings |= {"engine": engine, "blend": _override(engine.blend, blend)}
        super().__init__(**settings)

    @property
    def model(self) -> str:
        """What the engine's model is called."""
        return self.engine.model_name

    @property
    def _llm_type(self) -> str:
        return "cacheblend"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # LangChain's cache of answers keys on these, so all that changes an answer is here. Traces show them, so what
        # may hold a password is not: it changes no answer.
        settings = self.engine_settings or {"engine": type(self.engine).__name__}
        public = {name: settings[name] for name in sorted(settings) if name not in ("store", "base_url")}
        if args := public.get("engine_args"):
            public["engine_args"] = {name: args[name] for name in sorted(args) if name not in _SECRET_ENGINE_ARGS}
        return {
            **public,
            "model": self.model,
            "scope": self.engine.scope.digest,
            "blend": _plain(self.blend),
            **{name: getattr(self, name) for name in _SAMPLING},
        }

    def get_num_tokens(self, text: str) -> int:
        """Tokens in a text by the model's own tokenizer, without special tokens."""
        return self.engine.count_tokens(text)

    # BaseLLM's key for LangChain's cache of answers leaves a call's keyword arguments out: an answer of 5 tokens would
    # be served to a call that asks for 50. So a call's settings first become those of a copy of this object.

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        tags: list[str] | list[list[str]] | None = None,
        metadata: dict[str, Any] | list[dict[str, Any]] | None = None,
        run_name: str | list[str] | None = None,
        run_id: uuid.UUID | list[uuid.UUID | None] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """As in ``BaseLLM``; ``kwargs`` are settings for this call.

        Raises:
            ConfigError: an unknown or a bad setting.
        """
        llm = self._with(stop, kwargs)
        return super(CacheBlendLLM, llm).generate(
            prompts, llm.stop, callbacks, tags=tags, metadata=metadata, run_name=run_name, run_id=run_id
        )

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        *,
        tags: list[str] | list[list[str]] | None = None,
        metadata: dict[str, Any] | list[dict[str, Any]] | None = None,
        run_name: str | list[str] | None = None,
        run_id: uuid.UUID | list[uuid.UUID | None] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """Like :meth:`generate`; the engine runs in a thread."""
        llm = self._with(stop, kwargs)
        return await super(CacheBlendLLM, llm).agenerate(
            prompts, llm.stop, callbacks, tags=tags, metadata=metadata, run_name=run_name, run_id=run_id
        )

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        answers = self.engine.generate(prompts, **self._with(stop, kwargs)._request())
        read = sum(answer.stats.prompt_tokens for answer in answers)
        written = sum(len(answer.token_ids) for answer in answers)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return LLMResult(
            generations=[[Generation(text=answer.text, generation_info=_info(answer))] for answer in answers],
            llm_output={"model_name": self.model, "token_usage": usage},
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        for piece in self.engine.stream(prompt, **self._with(stop, kwargs)._request()):
            chunk = _chunk(piece)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        # BaseLLM's own version would call async handlers in another event loop than the caller's.
        request = self._with(stop, kwargs)._request()
        pieces = await asyncio.to_thread(self.engine.stream, prompt, **request)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            chunk = _chunk(piece)
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _with(self, stop: list[str] | None, overrides: Mapping[str, Any]) -> Self:
        """A copy around the same engine, with a call's settings in place of its own."""
        _refuse_unknown(overrides, ["blend", *_SAMPLING])
        changed = {**overrides, "blend": _override(self.blend, overrides.get("blend"))}
        if stop is not None:
            changed["stop"] = stop
        return self.model_copy(update=changed)

    def _request(self) -> dict[str, Any]:
        """Keyword arguments for the engine."""
        return {"blend": self.blend, **{name: getattr(self, name) for name in _SAMPLING}}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: an object built from settings is serialised as these settings."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The settings that rebuild the engine."""
        return {**(self.engine_settings or {}), "blend": _plain(self.blend)}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """URLs with a password in them, by the name of the secret that replaces them."""
        settings = self.engine_settings or {}
        urls = {name: settings[name] for name in ("store", "base_url") if isinstance(settings.get(name), str)}
        return {name: f"CACHEBLEND_{name.upper()}" for name, url in urls.items() if urlsplit(url).password}

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """As in LangChain, but not where settings can't rebuild the engine: it was given, or took a token."""
        if self.engine_settings is None or _SECRET_ENGINE_ARGS & (self.engine_settings.get("engine_args") or {}).keys():
            return self.to_json_not_implemented()
        return super().to_json()


def _refuse_unknown(settings: Mapping[str, Any], known: list[str]) -> None:
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}: known are {', '.join(known)}")


def _override(blend: BlendConfig, change: BlendConfig | Mapping[str, Any] | None) -> BlendConfig:
    return change if isinstance(change, BlendConfig) else blend.with_overrides(change)


def _plain(blend: BlendConfig) -> dict[str, Any]:
    return {**dataclasses.asdict(blend), "check_layers": list(blend.check_layers)}


def _info(answer: Answer) -> dict[str, Any]:
    return {"finish_reason": answer.finish_reason, "stats": answer.stats.to_dict(), "ttft": answer.stats.ttft}


def _chunk(piece: StreamPiece) -> GenerationChunk:
    return GenerationChunk(text=str(piece), generation_info=_info(piece.generation) if piece.generation else None)
