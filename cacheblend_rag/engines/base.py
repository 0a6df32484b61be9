"""What every engine does, whatever runs the model."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast, overload

import numpy as np

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.sampling import SamplingParams as SamplingParams
from cacheblend_rag.errors import (
    CacheBlendError,
    ChunkTooLongError,
    ConfigError,
    EngineClosedError,
    PromptTooLongError,
)
from cacheblend_rag.guard import Answered, Guard
from cacheblend_rag.prefetching import Prefetcher
from cacheblend_rag.stats import BlendStats, Generation, StreamPiece, WarmReport

if TYPE_CHECKING:
    from cacheblend_rag.chat.tool_format import ToolFormat
    from cacheblend_rag.chunks import ChunkScope, TokenIds

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]
Observer = Callable[[BlendStats], None]


class Engine(abc.ABC):
    """A model, a chunk store, and the blend of both. Threads may share it.

    Once it is closed, all calls but :meth:`close` and :meth:`prefetch` raise ``EngineClosedError``.

    Attributes:
        model_name: What the user called the model.
        blend: The settings that calls override.
        context_window: Most tokens of prompt plus answer.
        num_layers: Layers of the model.
        scope: Namespace, model and primer: which stored chunks it may read.
        settings: The arguments of ``load_engine`` that made it, to make it again elsewhere; None: made otherwise.
        guard: Compares a sample of the answers with full prefill, if that was asked for.
    """

    guard: Guard | None = None
    settings: Mapping[str, Any] | None = None
    model_name: str
    blend: BlendConfig
    context_window: int
    num_layers: int
    scope: ChunkScope
    _prefetcher: Prefetcher
    _closed: bool = False
    _question_layers: tuple[int, int] | None = None  # those of the model's profile
    _tool_format: ToolFormat | ConfigError | None = None
    _observers: tuple[Observer, ...] = ()
    _at_once: ClassVar[int] = 32  # answers that coroutines wait for at a time; more wait in turn

    @abc.abstractmethod
    def warm(self, chunks: Sequence[str], *, progress: Progress | None = None) -> WarmReport:
        """Prefill each chunk once, alone behind the primer, and store its KV. Warm chunks are skipped.

        Args:
            chunks: Chunk texts, exactly as prompts will hold them.
            progress: Called with (chunks done, chunks in all) after each.

        Raises:
            ChunkTooLongError: a chunk does not fit the context; raised before any is prefilled.
            StoreError: the store can't be written; chunks stored before stay.
            EngineMemoryError: there is no room for a chunk in memory; chunks stored before stay.
        """

    @abc.abstractmethod
    def evict(self, chunks: Sequence[str]) -> int:
        """Remove chunks from the store; returns how many were there.

        Raises:
            StoreError: the store can't be written.
        """

    def is_warm(self, chunks: Sequence[str]) -> list[bool]:
        """Which texts are stored now. One without tokens has nothing to store and counts as warm."""
        keys = self.chunk_keys(chunks)
        warm = self._held(keys) | {self.scope.key(np.empty(0, np.int32))}
        return [key in warm for key in keys]

    def prefetch(self, chunks: Sequence[str]) -> None:
        """Begin to bring the KV of stored chunks from disk to memory, in the background, and return at once.

        For texts that a prompt will hold soon. Those that are cold or in memory are left as they are, and so is
        everything where the store has no memory in front of its disk. A failure is logged.
        """
        self._prefetcher.add(chunks)

    def chunk_keys(self, chunks: Sequence[str]) -> list[str]:
        """The key that each text is stored under, whether it is stored or not."""
        return [self.scope.key(ids) for ids in self._encode_chunks(chunks)]

    def stored_keys(self) -> set[str]:
        """The keys of all chunks stored for this namespace, model and primer, by any process.

        Raises:
            StoreError: the store can't be read.
        """
        found: set[str] = set()
        cursor, some = self._keys_since(0)
        while some:
            found.update(some)
            cursor, some = self._keys_since(cursor)
        return found

    @abc.abstractmethod
    def evict_keys(self, keys: Sequence[str]) -> int:
        """Remove chunks of this namespace, model and primer from the store; returns how many were there.

        Raises:
            StoreError: the store can't be written.
        """

    def add_observer(self, observer: Observer) -> None:
        """Have something called with the stats of every answer, such as ``PrometheusMetrics`` or ``Spans``.

        It is called in the thread that reads the answer, once that is complete, and must be quick. What it raises is
        logged; answers don't suffer from it.
        """
        self._observers = (*self._observers, observer)

    def watch(self, share: float) -> None:
        """Compare a share of the blended answers with full prefill, see :mod:`cacheblend_rag.guard`.

        Args:
            share: In (0, 1].

        Raises:
            ConfigError: it is not.
        """
        if self.guard is not None:
            self.guard.close()
        self.guard = Guard(self._divergence, share)

    @abc.abstractmethod
    def _divergence(self, answered: Answered) -> float | None:
        """KL divergence of an answer from full prefill's, nats a token; None if its prompt is not blended any more."""

    @abc.abstractmethod
    def _prompt_ids(self, prompt: Prompt) -> Sequence[int] | TokenIds:
        """The token ids of a prompt, as it is read."""

    @property
    def _is_comparing(self) -> bool:
        """Whether this thread asks for the guard, which nobody is told of."""
        return self.guard is not None and self.guard.is_comparing

    def _finished(self, answered: Answered, stats: BlendStats) -> None:
        """Tell guard and observers of an answer that is complete."""
        if self._is_comparing:
            return
        if self.guard is not None:
            self.guard.saw(answered, stats)
        for observer in self._observers:
            try:
                observer(stats)
            except Exception:
                logger.exception("an observer of the engine failed")

    @abc.abstractmethod
    def _encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        """The token ids of each chunk, int32 ``[tokens]``."""

    @abc.abstractmethod
    def _held(self, keys: Sequence[str]) -> set[str]:
        """Those of some keys that a chunk of this scope is stored under."""

    @abc.abstractmethod
    def _keys_since(self, cursor: int) -> tuple[int, list[str]]:
        """Some keys of this scope, see :meth:`ChunkStore.keys_since`."""

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
            EngineMemoryError: there is no room for the prompt in memory.
            AnswerTimeoutError: there is a ``timeout``, and it is over.
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
        pieces = self.stream(prompt, blend=blend, **sampling)
        given_up = threading.Event()

        def collect() -> Generation:
            with contextlib.closing(cast(Generator[StreamPiece, None, None], pieces)):
                for piece in pieces:
                    if piece.generation is not None:
                        return piece.generation
                    if given_up.is_set():  # nobody waits any more: others may have the engine
                        break
            raise CacheBlendError("the answer was given up")

        try:
            context = contextvars.copy_context()  # for observers: the span that is current, for one
            return await asyncio.get_running_loop().run_in_executor(self._waiting, context.run, collect)
        except asyncio.CancelledError:
            given_up.set()
            raise

    async def astream(
        self, prompt: Prompt, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> AsyncIterator[StreamPiece]:
        """:meth:`stream`, without blocking the event loop."""
        pieces = self.stream(prompt, blend=blend, **sampling)
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        following = functools.partial(next, pieces, None)
        while (piece := await loop.run_in_executor(self._waiting, context.run, following)) is not None:
            yield piece

    @functools.cached_property
    def _waiting(self) -> ThreadPoolExecutor:
        """Threads in which coroutines wait: asyncio's own are few, and others need them too."""
        return ThreadPoolExecutor(self._at_once, thread_name_prefix="cacheblend")

    @abc.abstractmethod
    def _answer(self, prompts: Sequence[Prompt], config: BlendConfig, params: SamplingParams) -> list[Generation]:
        """Answer each prompt."""

    @abc.abstractmethod
    def _pieces(self, prompt: Prompt, config: BlendConfig, params: SamplingParams) -> Iterator[StreamPiece]:
        """Answer a prompt piece by piece."""

    @abc.abstractmethod
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> str:
        """Messages as one prompt text, by the model's chat template.

        Args:
            messages: In OpenAI's format: ``role``, ``content`` (text), and ``tool_calls`` or ``tool_call_id``.
            tools: In OpenAI's format, for the template to describe.
            add_generation_prompt: End with the opening of the model's answer.
            continue_final_message: End with the last message left open, for the model to go on with;
                ``add_generation_prompt`` must be False.
            chat_template_kwargs: Further variables of the template, such as ``enable_thinking``.
            timeout: Seconds to wait for a server that renders; None: what its client was given.

        Raises:
            ConfigError: the model has no chat template, or it refuses the messages.
        """

    @property
    def tool_format(self) -> ToolFormat:
        """How the model's chat template writes tool calls. Found out once, with a server by some requests.

        Raises:
            ConfigError: it has none that can be read.
        """
        from cacheblend_rag.chat.tool_format import find_tool_format

        if self._tool_format is None:
            try:
                self._tool_format = find_tool_format(self.render_chat, self.model_name)
            except ConfigError as error:
                self._tool_format = error
        if isinstance(self._tool_format, ConfigError):
            raise ConfigError(str(self._tool_format))
        return self._tool_format

    @abc.abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens, special ones included."""

    def token_ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, special ones included, as it is read."""
        self._check_open()
        return [int(token) for token in self._prompt_ids(prompt)]

    @abc.abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens in a text, without special tokens."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the model and close the store; closing twice does nothing."""

    def _stop_background(self) -> None:
        self._prefetcher.close()
        if self.guard is not None:
            self.guard.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed: load it again")

    def _settings(
        self, blend: Mapping[str, Any] | BlendConfig | None, sampling: dict[str, Any]
    ) -> tuple[BlendConfig, SamplingParams]:
        self._check_open()
        config = blend if isinstance(blend, BlendConfig) else self.blend.with_overrides(blend)
        config = config if self.guard is None else self.guard.adjust(config)
        config = config.or_question_layers(self._question_layers)
        config.check_layer_numbers(self.num_layers)
        known = [field.name for field in dataclasses.fields(SamplingParams)]
        for name in sampling:
            if name not in known:
                raise ConfigError(f"unknown sampling setting {name!r}: known are {', '.join(known)}")
        return config, SamplingParams(**sampling)

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
