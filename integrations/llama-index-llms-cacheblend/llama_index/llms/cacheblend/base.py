"""The language model."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cacheblend_rag import BlendConfig
from cacheblend_rag.chat import ChatPrompt, prepare_chat
from cacheblend_rag.engines.base import Engine, SamplingParams
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import Generation, StreamPiece
from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import Model, PydanticProgramMode
from pydantic import (
    BaseModel,
    Field,
    InstanceOf,
    PrivateAttr,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from llama_index.llms.cacheblend import messages as convert
from llama_index.llms.cacheblend.engines import HoldsEngine, obtain_engine, override, refuse_unknown, split_settings
from llama_index.llms.cacheblend.serializing import plain_settings

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

_PER_ANSWER = ("logprobs", "structured_outputs", "skip_special_tokens", "trace")
# Settings of the object and of each call; every one of them is an attribute.
_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name not in _PER_ANSWER)
_PER_CALL = [*_SAMPLING, "blend", "logprobs", "structured_outputs"]
_T = TypeVar("_T")
_CHAT = ["tools", "tool_choice", "parallel_tool_calls", "continue_final_message", "chat_template_kwargs"]


class CacheBlendLLM(HoldsEngine, FunctionCallingLLM):
    """A model that reuses the KV of passages it has read before, wherever they stand in a prompt.

    Built from settings, named as in ``cacheblend_rag.load_engine``, or around an engine that exists::

        llm = CacheBlendLLM(model="path-or-hub-id", store="chunks/", max_tokens=64)
        llm = CacheBlendLLM(engine=engine, max_tokens=64)
        llm = CacheBlendLLM(model="name", engine="server", base_url="http://localhost:8000/v1", max_tokens=64)

    A call may override the attributes, and single settings of ``blend``, and ask for ``logprobs`` (how many a token) or
    ``structured_outputs`` (such as ``{"json": schema}``). Anything else is a ``ConfigError``.

    ``complete`` continues the prompt as it is, ``chat`` uses the model's chat template. ``additional_kwargs`` of a
    response, or of the last one of a stream, holds ``stats`` (see ``cacheblend_rag.stats.BlendStats``), ``decision``,
    ``ttft`` in seconds, ``usage`` and ``finish_reason``; ``raw`` also the token ids and their log-probabilities.

    Attributes:
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
        timeout: Seconds to wait for an answer; with a server, for each of its messages.
        max_retries: How often a request that a server did not take is sent again.
    """

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
    timeout: float | None = None
    max_retries: int | None = None

    _has_template: bool = PrivateAttr()
    _has_tools: bool = PrivateAttr()

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
            settings: Arguments of ``cacheblend_rag.load_engine``, the attributes of this class, and those of
                LlamaIndex's ``LLM`` (``system_prompt``, ``callback_manager``, ...).

        Raises:
            ConfigError: an unknown or a bad setting, or one that an engine that exists can't take any more.
            UnsupportedModelError: the model can't be blended.
            StoreError: the chunk store can't be opened.
            ServerError: the server can't be reached.
        """
        # Before the model is loaded: a typo shouldn't cost minutes.
        load, fields = split_settings(settings, list(type(self).model_fields))
        if isinstance(fields.get("stop"), str):
            fields["stop"] = [fields["stop"]]
        SamplingParams(**{name: fields[name] for name in _SAMPLING if name in fields})
        engine = obtain_engine("CacheBlendLLM", engine, load, blend)
        super().__init__(engine, **fields, blend=override(engine.blend, blend))
        self._has_template = _succeeds(lambda: engine.render_chat([{"role": "user", "content": "?"}]))
        self._has_tools = self._has_template and _succeeds(lambda: engine.tool_format)

    @classmethod
    def class_name(cls) -> str:
        """The name in serialised data."""
        return "cacheblend_llm"

    @property
    def model(self) -> str:
        """What the engine's model is called."""
        return self.engine.model_name

    @property
    def metadata(self) -> LLMMetadata:
        """The model's real context, and what its chat template can do."""
        return LLMMetadata(
            context_window=self.engine.context_window,
            num_output=self.max_tokens,
            is_chat_model=self._has_template,
            is_function_calling_model=self._has_tools,
            model_name=self.model,
        )

    @property
    def tokenizer(self) -> Callable[[str], list[int]]:
        """For ``Settings.tokenizer``: LlamaIndex then counts tokens, of which it wants a list, as the model does."""
        return lambda text: list(range(self.engine.count_tokens(text)))

    @model_serializer(mode="wrap")
    def custom_model_dump(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """The settings that make this object again with ``from_dict``, without secrets."""
        return {
            **handler(self),
            **plain_settings(self.engine.settings or {}),
            "blend": self.blend.to_dict(),
            "class_name": self.class_name(),
        }

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a prompt; ``kwargs`` are settings for this call."""
        request = self._request(kwargs)
        return self._completion(self.engine.generate(self._formatted(prompt, formatted), **request))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Like :meth:`complete`, piece by piece."""
        pieces = self.engine.stream(self._formatted(prompt, formatted), **self._request(kwargs))

        def responses() -> CompletionResponseGen:
            text = ""
            for piece in pieces:
                text += piece
                yield self._partial_completion(text, piece)

        return responses()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Like :meth:`complete`, without blocking the event loop."""
        request = self._request(kwargs)
        answer = await self.engine.agenerate(self._formatted(prompt, formatted), **request)
        return await _off_loop(answer, lambda: self._completion(answer))

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Like :meth:`stream_complete`, without blocking the event loop."""
        pieces = self.engine.astream(self._formatted(prompt, formatted), **self._request(kwargs))

        async def responses() -> CompletionResponseAsyncGen:
            text = ""
            async with contextlib.aclosing(_generator(pieces)) as open_pieces:
                async for piece in open_pieces:
                    text += piece
                    yield await _off_loop(piece.generation, lambda: self._partial_completion(text, piece))  # noqa: B023

        return responses()

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages.

        Args:
            messages: Text, tool calls, and results of tools.
            kwargs: Settings for this call, and ``tools`` (in OpenAI's format), ``tool_choice``,
                ``parallel_tool_calls``, ``chat_template_kwargs`` (further variables of the chat template), and
                ``continue_final_message`` (go on with a last message of the assistant).

        Raises:
            ConfigError: a bad setting, messages that are no text, or tools where the chat template knows none.
            PromptTooLongError: the messages and ``max_tokens`` don't fit the context.
        """
        chat, request = self._prepare(messages, kwargs)
        return self._chat_response(chat, self.engine.generate(chat.prompt, **request))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Like :meth:`chat`, piece by piece."""
        chat, request = self._prepare(messages, kwargs)
        pieces = self.engine.stream(chat.prompt, **request)

        def responses() -> ChatResponseGen:
            partial = _PartialChat(self, chat)
            for piece in pieces:
                yield from partial.add(piece)

        return responses()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Like :meth:`chat`, without blocking the event loop."""
        chat, request = await asyncio.to_thread(self._prepare, messages, kwargs)
        answer = await self.engine.agenerate(chat.prompt, **request)
        return await _off_loop(answer, lambda: self._chat_response(chat, answer))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Like :meth:`stream_chat`, without blocking the event loop."""
        chat, request = await asyncio.to_thread(self._prepare, messages, kwargs)
        pieces = self.engine.astream(chat.prompt, **request)

        async def responses() -> ChatResponseAsyncGen:
            partial = _PartialChat(self, chat)
            async with contextlib.aclosing(_generator(pieces)) as open_pieces:
                async for piece in open_pieces:
                    for response in await _off_loop(piece.generation, lambda: partial.add(piece)):  # noqa: B023
                        yield response

        return responses()

    # Tools and structured output

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(ChatMessage(content=user_msg) if isinstance(user_msg, str) else user_msg)
        return {
            "messages": messages,
            "tools": [convert.to_openai_tool(tool) for tool in tools],
            "tool_choice": convert.tool_choice(tool_choice, tool_required),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls in a response, or in what there is of one that streams.

        Raises:
            ValueError: there are none, and ``error_on_no_tool_call`` is set.
        """
        calls = convert.tool_selections(response.message)
        if not calls and error_on_no_tool_call:
            raise ValueError(f"expected at least one tool call, but the model answered {response.message.content!r}")
        return calls

    # LlamaIndex asks a model without tools for JSON in words, and one with tools for a call, which it does not require
    # when it streams. Here the answer can't be anything else.

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """As in LlamaIndex; without tools in the chat template, by constrained decoding."""
        llm_kwargs = self._constrained(output_cls, llm_kwargs)
        output: Model = super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        return output

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Like :meth:`structured_predict`."""
        llm_kwargs = self._constrained(output_cls, llm_kwargs)
        output: Model = await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        return output

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        program = get_program_for_llm(output_cls, prompt, self, pydantic_program_mode=PydanticProgramMode.LLM)
        return program.stream_call(llm_kwargs=_as_json(output_cls, llm_kwargs), **prompt_args)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        program = get_program_for_llm(output_cls, prompt, self, pydantic_program_mode=PydanticProgramMode.LLM)
        return await program.astream_call(llm_kwargs=_as_json(output_cls, llm_kwargs), **prompt_args)

    def _constrained(self, output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        mode = self.pydantic_program_mode
        if mode == PydanticProgramMode.LLM or (mode == PydanticProgramMode.DEFAULT and not self._has_tools):
            return _as_json(output_cls, llm_kwargs)
        return llm_kwargs

    # Requests and responses

    def _request(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for the engine."""
        refuse_unknown(overrides, _PER_CALL)
        settings = {**{name: getattr(self, name) for name in _SAMPLING}, **_given(overrides)}
        return {**_given(settings), "blend": override(self.blend, overrides.get("blend"))}

    def _formatted(self, prompt: str, formatted: bool) -> str:
        assert self.completion_to_prompt is not None  # LLM sets one
        return prompt if formatted else self.completion_to_prompt(prompt)

    def _prepare(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> tuple[ChatPrompt, dict[str, Any]]:
        refuse_unknown(kwargs, [*_PER_CALL, *_CHAT])
        request = self._request({name: value for name, value in kwargs.items() if name not in _CHAT})
        structured = request.pop("structured_outputs", None)
        tools = kwargs.get("tools")
        if not tools and (not self._has_template or self.messages_to_prompt is not generic_messages_to_prompt):
            if ignored := [name for name in _CHAT if kwargs.get(name) and name != "parallel_tool_calls"]:
                raise ConfigError(f"{', '.join(ignored)}: needs the model's chat template, which is not used here")
            assert self.messages_to_prompt is not None  # LLM sets one
            sampling = {} if structured is None else {"structured_outputs": structured}
            chat = ChatPrompt(self.messages_to_prompt(messages), sampling, None)
        else:
            chat = prepare_chat(
                self.engine,
                [convert.to_openai(message) for message in messages],
                tools=tools,
                tool_choice=convert.tool_choice(kwargs.get("tool_choice"), required=False),
                parallel_tool_calls=kwargs.get("parallel_tool_calls", True),
                structured_outputs=structured,
                continue_final_message=kwargs.get("continue_final_message", False),
                chat_template_kwargs=kwargs.get("chat_template_kwargs"),
                timeout=request.get("timeout"),
            )
        return chat, {**request, **chat.sampling}

    def _about(self, answer: Generation | None) -> dict[str, Any]:
        """The fields of a response that tell of the whole answer, if it is there."""
        if answer is None:
            return {}
        return {
            "raw": convert.raw(answer),
            "additional_kwargs": convert.report(answer),
            "logprobs": convert.logprobs(self.engine, answer),
        }

    def _completion(self, answer: Generation) -> CompletionResponse:
        return CompletionResponse(text=answer.text, **self._about(answer))

    def _partial_completion(self, text: str, piece: StreamPiece) -> CompletionResponse:
        return CompletionResponse(text=text, delta=str(piece), **self._about(piece.generation))

    def _chat_response(self, chat: ChatPrompt, answer: Generation) -> ChatResponse:
        reply = chat.parse(answer.text)
        message = convert.assistant_message(reply.content, reply.tool_calls)
        return ChatResponse(message=message, **self._about(answer))


class _PartialChat:
    """Makes responses of the pieces of a streamed answer."""

    def __init__(self, llm: CacheBlendLLM, chat: ChatPrompt) -> None:
        self._llm = llm
        self._chat = chat
        self._parser = chat.stream_parser()
        self._partial = convert.PartialReply()

    def add(self, piece: StreamPiece) -> list[ChatResponse]:
        """The response that a piece makes; none if it must wait for more to be understood."""
        if piece.generation is not None:
            new = self._partial.finish(self._chat.parse(piece.generation.text))
        elif deltas := self._parser.add(str(piece)):
            new = self._partial.add(deltas)
        else:
            return []
        message = convert.assistant_message(self._partial.text, self._partial.calls)
        return [ChatResponse(message=message, delta=new, **self._llm._about(piece.generation))]


def _as_json(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    return {"structured_outputs": {"json": output_cls.model_json_schema()}, **(llm_kwargs or {})}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _succeeds(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except ConfigError:
        return False
    return True


async def _off_loop(answer: Generation | None, make: Callable[[], _T]) -> _T:
    """What ``make`` returns; in a thread where it may ask a server for the texts of tokens."""
    return await asyncio.to_thread(make) if answer is not None and answer.logprobs is not None else make()


def _generator(pieces: Any) -> AsyncGenerator[StreamPiece, None]:
    return pieces  # type: ignore[no-any-return]  # astream is an async generator, declared as less
