"""What ``CacheBlendLLM`` and ``ChatCacheBlend`` have in common: an engine, settings, errors, serialisation."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
from collections.abc import Iterator, Mapping
from typing import Any

from cacheblend_rag import BlendConfig, load_engine
from cacheblend_rag.engines.base import Engine, SamplingParams
from cacheblend_rag.errors import ConfigError, PromptTooLongError
from cacheblend_rag.redaction import is_secret, without_credentials
from cacheblend_rag.stats import Generation
from langchain_core.exceptions import ContextOverflowError
from langchain_core.load.serializable import Serializable, SerializedConstructor, SerializedNotImplemented
from langchain_core.utils import secret_from_env
from pydantic import ConfigDict, Field, InstanceOf, SecretStr

_LOAD_SETTINGS = (
    "model",
    "store",
    "dtype",
    "device",
    "primer",
    "namespace",
    "codec",
    "base_url",
    "chat_template",
    "guard",
    "engine_args",
)
_PATIENCE = ("timeout", "max_retries")  # change no answer
_API_KEY_VARIABLE = "CACHEBLEND_API_KEY"
_PER_CALL = ("logprobs", "structured_outputs", "skip_special_tokens", "trace")
SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name not in _PER_CALL)
"""Settings of both classes, and of their calls, that are fields of ``SamplingParams``."""


class PromptOverflowError(PromptTooLongError, ContextOverflowError):
    """The prompt does not fit the model's context: what LangChain's middleware catches to shorten a conversation."""


class EngineModel(Serializable):
    """A model around an engine.

    Attributes:
        engine: The engine; a vector store and a retriever built around it share its chunk store.
        engine_settings: What the engine was loaded with; None if it was given.
        blend: How prompts with known passages are blended.
        max_tokens: Most tokens to generate.
        temperature: 0 is greedy.
        top_p: Keep the most likely tokens up to this total probability.
        top_k: Keep this many of the most likely tokens; 0 or -1 keeps all.
        min_p: Keep the tokens that are at least this share as likely as the most likely one.
        seed: Makes sampling repeatable.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer.
        min_tokens: Fewest tokens before the answer may end by itself.
        ignore_eos: Go on after an end-of-sequence token.
        presence_penalty: See ``cacheblend_rag.engines.sampling.SamplingParams``, and so the next three.
        frequency_penalty: See there.
        repetition_penalty: See there.
        logit_bias: See there.
        n: Answers to each prompt; with a seed, the second has the next seed, and so on. Streams give one.
        timeout: Seconds to wait for an answer; with a server, for each of its messages.
        max_retries: How often a request that a server did not take is sent again.
        api_key: The server's, by default from the environment variable CACHEBLEND_API_KEY. An engine that was given has
            its own.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: Engine = Field(exclude=True, repr=False)
    engine_settings: dict[str, Any] | None = Field(default=None, exclude=True, repr=False)
    blend: InstanceOf[BlendConfig] = Field(exclude=True)
    max_tokens: int = SamplingParams.max_tokens
    temperature: float = SamplingParams.temperature
    top_p: float = SamplingParams.top_p
    top_k: int = SamplingParams.top_k
    min_p: float = SamplingParams.min_p
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int = SamplingParams.min_tokens
    ignore_eos: bool = SamplingParams.ignore_eos
    presence_penalty: float = SamplingParams.presence_penalty
    frequency_penalty: float = SamplingParams.frequency_penalty
    repetition_penalty: float = SamplingParams.repetition_penalty
    logit_bias: dict[int, float] | None = None
    n: int = Field(default=1, ge=1)
    timeout: float | None = None
    max_retries: int | None = None
    api_key: SecretStr | None = Field(default_factory=secret_from_env(_API_KEY_VARIABLE, default=None))

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
            settings: ``model``, ``store``, ``dtype``, ``device``, ``primer``, ``namespace``, ``codec``,
                ``base_url``, ``chat_template``, ``guard`` and ``engine_args`` as for ``cacheblend_rag.load_engine``,
                and the attributes of this class.

        Raises:
            ConfigError: an unknown or a bad setting, or one that an engine that exists can't take any more.
            UnsupportedModelError: the model can't be blended.
            StoreError: the chunk store can't be opened.
        """
        load = {name: settings.pop(name) for name in _LOAD_SETTINGS if name in settings}
        # Before the model is loaded: a typo shouldn't cost minutes.
        refuse_unknown(settings, [*_LOAD_SETTINGS, *type(self).model_fields])
        SamplingParams(**{name: settings[name] for name in SAMPLING if name in settings})
        if isinstance(engine, str):
            if load.get("model") is None:
                raise ConfigError(
                    f"{type(self).__name__} needs model=<path or hub id>, or engine=<an engine that exists>"
                )
            checked = override(BlendConfig(), blend)
            load |= {name: os.fspath(value) for name, value in load.items() if isinstance(value, os.PathLike)}
            settings["engine_settings"] = {"engine": engine, **load}
            defaults = None if engine == "server" else checked  # a server has defaults of its own
            key = settings.get("api_key") or os.environ.get(_API_KEY_VARIABLE)
            if engine == "server" and key:
                secret = key.get_secret_value() if isinstance(key, SecretStr) else key
                load["engine_args"] = {"api_key": secret, **(load.get("engine_args") or {})}
            engine = load_engine(load.pop("model"), engine=engine, blend=defaults, **load)
        elif load:
            raise ConfigError(f"{', '.join(load)}: decided when the engine was loaded, not where it is wrapped")
        settings |= {"engine": engine, "blend": override(engine.blend, blend)}
        super().__init__(**settings)

    @property
    def model(self) -> str:
        """What the engine's model is called."""
        return self.engine.model_name

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # LangChain's cache of answers keys on these, so all that changes an answer is here. Traces show them, so what
        # may hold a password is not: it changes no answer.
        settings = self.engine_settings or {"engine": type(self.engine).__name__}
        public = {name: settings[name] for name in sorted(settings) if name not in ("store", "base_url")}
        if args := public.get("engine_args"):
            public["engine_args"] = {name: args[name] for name in sorted(args) if not is_secret(name)}
        return {
            **public,
            "model": self.model,
            "scope": self.engine.scope.digest,
            "blend": self.blend.to_dict(),
            "n": self.n,
            **{name: getattr(self, name) for name in SAMPLING if name not in _PATIENCE},
        }

    def get_num_tokens(self, text: str) -> int:
        """Tokens in a text by the model's own tokenizer, without special tokens."""
        return self.engine.count_tokens(text)

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """True: an object built from settings is serialised as these settings."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The settings that rebuild the engine."""
        return {**(self.engine_settings or {}), "blend": self.blend.to_dict()}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The key, and URLs with credentials in them, by the name of the secret that replaces them."""
        settings = self.engine_settings or {}
        urls = {name: settings[name] for name in ("store", "base_url") if isinstance(settings.get(name), str)}
        secret = [name for name, url in urls.items() if "://" in url and without_credentials(url) != url]
        return {"api_key": _API_KEY_VARIABLE, **{name: f"CACHEBLEND_{name.upper()}" for name in secret}}

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """As in LangChain, but not where settings can't rebuild the engine: it was given, or took a secret."""
        if self.engine_settings is None or any(map(is_secret, self.engine_settings.get("engine_args") or {})):
            return self.to_json_not_implemented()
        return super().to_json()


@contextlib.contextmanager
def langchain_errors() -> Iterator[None]:
    """What the engine raises, as what LangChain's users catch too."""
    try:
        yield
    except PromptTooLongError as error:
        raise PromptOverflowError(str(error)) from error


def requests(request: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """Keyword arguments for the engine for each of ``n`` answers to a prompt.

    Raises:
        ConfigError: ``n`` is no whole number from 1.
    """
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"n must be a whole number from 1, not {n!r}")
    seed = request["seed"]
    return [{**request, "seed": None if seed is None else seed + number} for number in range(n)]


def openai_logprobs(engine: Engine, answer: Generation) -> dict[str, Any] | None:
    """The log-probabilities of an answer in OpenAI's format for chats; None if there are none."""
    if answer.logprobs is None:
        return None
    texts = {token: engine.decode([token]) for token in {token for entry in answer.logprobs for token in entry}}

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts[token], "bytes": list(texts[token].encode()), "logprob": logprob}

    content = [
        {
            **entry(token, found[token]),
            "top_logprobs": [entry(*top) for top in sorted(found.items(), key=operator.itemgetter(1), reverse=True)],
        }
        for token, found in zip(answer.token_ids, answer.logprobs, strict=True)
    ]
    return {"content": content}


def refuse_unknown(settings: Mapping[str, Any], known: list[str]) -> None:
    """Refuse misspelt settings.

    Raises:
        ConfigError: a setting is not among the known.
    """
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}: known are {', '.join(known)}")


def override(blend: BlendConfig, change: BlendConfig | Mapping[str, Any] | None) -> BlendConfig:
    """Settings of the blend with some of them changed, or all."""
    return change if isinstance(change, BlendConfig) else blend.with_overrides(change)


def answer_info(engine: Engine, answer: Generation) -> dict[str, Any]:
    """How an answer ended, how its prompt was read, and its log-probabilities if they were asked for."""
    stats = answer.stats
    info = {
        "finish_reason": answer.finish_reason,
        "ttft": stats.ttft,
        "decision": stats.decision,
        "stats": stats.to_dict(),
    }
    logprobs = openai_logprobs(engine, answer)
    return info if logprobs is None else {**info, "logprobs": logprobs}
