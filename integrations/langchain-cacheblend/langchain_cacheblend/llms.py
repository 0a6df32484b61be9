"""The language model: text in, text out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Self

from cacheblend_rag.stats import Generation as Answer
from cacheblend_rag.stats import StreamPiece
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, Callbacks
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import Field

from langchain_cacheblend.engine_model import (
    SAMPLING,
    EngineModel,
    answer_info,
    langchain_errors,
    override,
    refuse_unknown,
    requests,
)


class CacheBlendLLM(EngineModel, BaseLLM):
    """A model that reuses the KV of passages it has read before, wherever they stand in a prompt.

    Built from settings, named as in ``cacheblend_rag.load_engine``, or around an engine that exists::

        llm = CacheBlendLLM(model="path-or-hub-id", store="chunks/", max_tokens=64)
        llm = CacheBlendLLM(engine=engine, max_tokens=64)
        llm = CacheBlendLLM(model="name", engine="server", base_url="http://localhost:8000/v1", max_tokens=64)

    A call may override the settings, and single ones of ``blend``: ``llm.invoke(prompt, max_tokens=10,
    blend={"recompute_ratio": 0.3})``, or with ``bind``.

    ``generation_info`` of a generation, and of the last chunk of a stream, holds ``finish_reason``, ``ttft`` in
    seconds, ``decision``, ``stats`` (see ``cacheblend_rag.stats.BlendStats``) and, if asked for, ``logprobs`` in
    OpenAI's format.

    Attributes:
        logprobs: Return the log-probabilities of this many of the most likely tokens, and of the one chosen.
    """

    logprobs: int | None = Field(default=None, ge=0)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {**super()._identifying_params, "logprobs": self.logprobs}

    @property
    def _llm_type(self) -> str:
        return "cacheblend"

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
        llm = self._with(stop, kwargs)
        with langchain_errors():
            return self._result([self.engine.generate(prompts, **request) for request in llm._requests()])

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        async def answers(request: dict[str, Any]) -> list[Answer]:
            return await asyncio.gather(*(self.engine.agenerate(prompt, **request) for prompt in prompts))

        llm = self._with(stop, kwargs)
        with langchain_errors():
            wanted = await asyncio.gather(*(answers(request) for request in llm._requests()))
            return await asyncio.to_thread(self._result, wanted)  # a server tells the text of tokens

    def _result(self, answers: Sequence[Sequence[Answer]]) -> LLMResult:
        """The first answers to all prompts, the second answers, and so on, as LangChain has them."""
        read = sum(answer.stats.prompt_tokens for answer in answers[0])
        written = sum(len(answer.token_ids) for some in answers for answer in some)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return LLMResult(
            generations=[
                [Generation(text=answer.text, generation_info=answer_info(self.engine, answer)) for answer in to_one]
                for to_one in zip(*answers, strict=True)
            ],
            llm_output={"model_name": self.model, "token_usage": usage},
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with langchain_errors():
            for piece in self.engine.stream(prompt, **self._with(stop, {**kwargs, "n": 1})._requests()[0]):
                chunk = self._chunk(piece)
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
        with langchain_errors():
            async for piece in self.engine.astream(prompt, **self._with(stop, {**kwargs, "n": 1})._requests()[0]):
                chunk = await asyncio.to_thread(self._chunk, piece) if piece.generation else self._chunk(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _with(self, stop: list[str] | None, overrides: Mapping[str, Any]) -> Self:
        """A copy around the same engine, with a call's settings in place of its own."""
        refuse_unknown(overrides, ["blend", "n", "logprobs", *SAMPLING])
        changed = {**overrides, "blend": override(self.blend, overrides.get("blend"))}
        if stop is not None:
            changed["stop"] = stop
        return self.model_copy(update=changed)

    def _requests(self) -> list[dict[str, Any]]:
        """Keyword arguments for the engine, for each answer to a prompt."""
        request = {name: getattr(self, name) for name in ("blend", "logprobs", *SAMPLING)}
        return requests(request, self.n)

    def _chunk(self, piece: StreamPiece) -> GenerationChunk:
        info = answer_info(self.engine, piece.generation) if piece.generation else None
        return GenerationChunk(text=str(piece), generation_info=info)
