"""What every engine does, whatever runs the model."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast, overload

import numpy as np

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ChunkTooLongError, ConfigError, PromptTooLongError
from cacheblend_rag.stats import Generation, StreamPiece, WarmReport
from cacheblend_rag.validation import is_number, is_whole

if TYPE_CHECKING:
    from cacheblend_rag.chunks import ChunkScope, TokenIds

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, named as in vLLM.

    Attributes:
        max_tokens: Most tokens to generate, at least 1.
        temperature: 0 is greedy.
        top_p: Keep the most likely tokens up to this total probability, in (0, 1].
        top_k: Keep this many of the most likely tokens; 0 or -1 keeps all.
        seed: Makes sampling repeatable.
        stop: Strings that end the answer; not part of its text.
        logprobs: Return log-probabilities of this many top tokens.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        if any(not isinstance(text, str) or not text for text in stop):
            raise ConfigError(f"stop must be non-empty strings, not {self.stop!r}")
        if not is_whole(self.max_tokens) or self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")
        if not is_number(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature must be a number from 0, not {self.temperature!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be a number in (0, 1], not {self.top_p!r}")
        if not is_whole(self.top_k) or self.top_k < -1:
            raise ConfigError(f"top_k must be a whole number from -1, not {self.top_k!r}")
        if self.seed is not None and not is_whole(self.seed):
            raise ConfigError(f"seed must be a whole number, not {self.seed!r}")
        if self.logprobs is not None and (not is_whole(self.logprobs) or self.logprobs < 0):
            raise ConfigError(f"logprobs must be a whole number from 0, not {self.logprobs!r}")


class Engine(abc.ABC):
    """A model, a chunk store, and the blend of both. Threads may share it.

    Attributes:
        model_name: What the user called the model.
        blend: The settings that calls override.
        context_window: Most tokens of prompt plus answer.
        num_layers: Layers of the model.
        scope: Namespace, model and primer: which stored chunks it may read.
    """

    model_name: str
    blend: BlendConfig
    context_window: int
    num_layers: int
    scope: ChunkScope

    @abc.abstractmethod
    def warm(self, chunks: Sequence[str], *, progress: Progress | None = None) -> WarmReport:
        """Prefill each chunk once, alone behind the primer, and store its KV. Warm chunks are skipped.

        Args:
            chunks: Chunk texts, exactly as prompts will hold them.
            progress: Called with (chunks done, chunks in all) after each.

        Raises:
            ChunkTooLongError: a chunk does not fit the context; raised before any is prefilled.
            StoreError: the store can't be written; chunks stored before stay.
        """

    @abc.abstractmethod
    def evict(self, chunks: Sequence[str]) -> int:
        """Remove chunks from the store; returns how many were there.

        Raises:
            StoreError: the store can't be written.
        """

    @overload
    def generate(
        self, prompt: str, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[int], *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        *,
        blend: Mapping[str, Any] | BlendConfig | None = None,
        **sampling: Any,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        blend: Mapping[str, Any] | BlendConfig | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """Answer a prompt, or each of a list of prompts.

        Args:
            prompt: Text, token ids, or a list of either.
            blend: Settings for this call, such as ``{"recompute_ratio": 0.3}``.
            sampling: Fields of :class:`SamplingParams`.

        Raises:
            ConfigError: a bad setting.
            PromptTooLongError: prompt plus ``max_tokens`` does not fit the context.
        """
        config, params = self._settings(blend, sampling)
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int | np.integer)):
            return self._answer([cast(Prompt, prompt)], config, params)[0]
        return self._answer(cast(Sequence[Prompt], prompt), config, params)

    def stream(
        self, prompt: Prompt, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> Iterator[StreamPiece]:
        """Like :meth:`generate` for one prompt, piece by piece; the last piece carries the whole generation.

        Settings are checked at the call, the prompt is read at the first piece. Pieces may be taken from different
        threads, one at a time. A stream that is given up blocks nobody.
        """
        config, params = self._settings(blend, sampling)
        return self._pieces(prompt, config, params)

    async def agenerate(
        self, prompt: Prompt, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> Generation:
        """:meth:`generate` for one prompt, without blocking the event loop."""
        config, params = self._settings(blend, sampling)
        (answer,) = await asyncio.to_thread(self._answer, [prompt], config, params)
        return answer

    async def astream(
        self, prompt: Prompt, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> AsyncIterator[StreamPiece]:
        """:meth:`stream`, without blocking the event loop."""
        pieces = self.stream(prompt, blend=blend, **sampling)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    @abc.abstractmethod
    def _answer(self, prompts: Sequence[Prompt], config: BlendConfig, params: SamplingParams) -> list[Generation]:
        """Answer each prompt."""

    @abc.abstractmethod
    def _pieces(self, prompt: Prompt, config: BlendConfig, params: SamplingParams) -> Iterator[StreamPiece]:
        """Answer a prompt piece by piece."""

    @abc.abstractmethod
    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages (``role``, ``content``) as one prompt text, by the model's chat template, ready for its answer.

        Raises:
            ConfigError: the model has no chat template.
        """

    @abc.abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens in a text, without special tokens."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the model and close the store; closing twice does nothing."""

    def _settings(
        self, blend: Mapping[str, Any] | BlendConfig | None, sampling: dict[str, Any]
    ) -> tuple[BlendConfig, SamplingParams]:
        config = blend if isinstance(blend, BlendConfig) else self.blend.with_overrides(blend)
        self._check_layers(config)
        known = [field.name for field in dataclasses.fields(SamplingParams)]
        for name in sampling:
            if name not in known:
                raise ConfigError(f"unknown sampling setting {name!r}: known are {', '.join(known)}")
        return config, SamplingParams(**sampling)

    def _check_layers(self, config: BlendConfig) -> None:
        if config.check_layers[-1] >= self.num_layers:
            raise ConfigError(
                f"check_layers {config.check_layers} must be below {self.num_layers}, the layers of this model"
            )

    def _check_chunks(self, encoded: Sequence[Sequence[int] | TokenIds], room: int) -> None:
        for index, ids in enumerate(encoded):
            if len(ids) > room:
                raise ChunkTooLongError(
                    f"chunk {index} has {len(ids)} tokens, but only {room} fit the model's context behind the primer: "
                    "split it into smaller chunks"
                )

    def _check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens == 0:
            raise ConfigError("the prompt has no tokens")
        if prompt_tokens + max_tokens > self.context_window:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, but the model's context is "
                f"{self.context_window}: shorten the prompt or lower max_tokens"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
