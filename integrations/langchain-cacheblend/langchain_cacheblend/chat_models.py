"""The chat model: messages in, a message out, by the model's own chat template."""

from __future__ import annotations

import asyncio
import hashlib
import json
import operator
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cacheblend_rag.chat import ChatPrompt, TextDelta, ToolParser, prepare_chat
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import Generation
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    InvalidToolCall,
    ToolCall,
    convert_to_openai_messages,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.outputs import Generation as LangChainGeneration
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel, Field

from langchain_cacheblend.engine_model import (
    SAMPLING,
    EngineModel,
    answer_info,
    langchain_errors,
    override,
    refuse_unknown,
    requests,
)

_CHAT_SETTINGS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "structured_outputs",
    "logprobs",
    "top_logprobs",
    "continue_final_message",
    "chat_template_kwargs",
)
StructuredOutputMethod = Literal["json_schema", "function_calling", "json_mode"]


class ChatCacheBlend(EngineModel, BaseChatModel):
    """A chat model that reuses the KV of passages it has read before, wherever they stand in a conversation.

    Built from settings, named as in ``cacheblend_rag.load_engine``, or around an engine that exists::

        model = ChatCacheBlend(model="path-or-hub-id", store="chunks/", max_tokens=200)
        model = ChatCacheBlend(engine=engine)
        model = ChatCacheBlend(model="name", engine="server", base_url="http://localhost:8000/v1")

    Tools are described to the model by its chat template and called in the template's own format. Decoding is
    constrained, so that calls fit the schemas of their tools: where a call is required, and where text that begins as a
    call can be told from other text. A call that is cut off at ``max_tokens`` is text.

    A call may override the settings, and single ones of ``blend``: ``model.invoke(messages, max_tokens=10,
    blend={"recompute_ratio": 0.3})``. It may constrain its answer by ``structured_outputs`` (see
    ``cacheblend_rag.structured``) or ``response_format`` (as in OpenAI's API), and have it go on with a last message of
    the assistant by ``continue_final_message=True``.

    ``usage_metadata`` of an answer divides the prompt's tokens among ``cache_read`` (their KV was reused, shifted or as
    an exact prefix), ``cacheblend_recomputed`` and ``cacheblend_missed``. ``response_metadata`` holds ``model_name``,
    ``finish_reason``, ``ttft`` in seconds, ``decision``, ``stats`` (see ``cacheblend_rag.stats.BlendStats``) and, if
    asked for, ``logprobs`` in OpenAI's format. A streamed answer carries them on its last chunk.

    Attributes:
        logprobs: Return the log-probability of each token.
        top_logprobs: And those of this many of the most likely tokens.
        streaming: Have ``invoke`` stream to callbacks.
        chat_template_kwargs: Further variables of the chat template, such as ``enable_thinking``.
    """

    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0)
    streaming: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def _llm_type(self) -> str:
        return "chat-cacheblend"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("logprobs", "top_logprobs", "chat_template_kwargs")
        return {**super()._identifying_params, **{name: getattr(self, name) for name in names}}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        # LangChain's own key for its cache of answers knows nothing of an engine that was given.
        settings = self.engine.settings or {}
        template = settings.get("chat_template")
        if isinstance(template, str | os.PathLike) and "{" not in str(template):
            template = Path(template).expanduser().read_text(encoding="utf-8")
        where = hashlib.sha256(f"{template} {settings.get('base_url')}".encode()).hexdigest()
        params = {**self._identifying_params, **kwargs, **({} if stop is None else {"stop": stop}), "engine": where}
        params |= {"response_format": None, "structured_outputs": _structured_outputs(kwargs)}
        return json.dumps(params, sort_keys=True, default=str)

    def _resolve_model_profile(self) -> ModelProfile:
        has_tools = self._has_tools()
        return ModelProfile(
            max_input_tokens=self.engine.context_window - self.max_tokens,
            max_output_tokens=self.max_tokens,
            text_inputs=True,
            text_outputs=True,
            tool_calling=has_tools,
            tool_choice=has_tools,
            # An answer in a schema is to be had without tools; but with them, agents do better to ask for it by a tool,
            # which shows the schema to the model.
            structured_output=not has_tools,
        )

    def _has_tools(self) -> bool:
        try:
            _ = self.engine.tool_format
        except ConfigError:
            return False
        return True

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Tokens of messages as the model reads them: by its chat template, with the opening of its answer."""
        converted = [convert_to_openai_tool(tool) for tool in tools or []]
        prompt = prepare_chat(
            self.engine,
            _openai_messages(messages),
            tools=converted,
            tool_choice="none",
            chat_template_kwargs=self.chat_template_kwargs,
        ).prompt
        return self.engine.count_tokens(prompt)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = True,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the model call tools.

        Args:
            tools: Anything that ``convert_to_openai_tool`` takes.
            tool_choice: ``"auto"`` or None: the model decides. ``"none"``: no calls. ``"any"``, ``"required"`` or True:
                at least one call. A tool's name, or ``{"type": "function", "function": {"name": ...}}``: a call of it.
            parallel_tool_calls: An answer may hold several calls; None: it may.
            strict: Taken as OpenAI's models take it, and makes no difference.
            kwargs: Further settings of the calls.

        Raises:
            ConfigError: a tool that isn't there, or a chat template without tools.
        """
        converted = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        choice = _tool_choice(tool_choice)
        names = [str(tool.get("function", {}).get("name")) for tool in converted]
        if choice not in ("auto", "none", "required", *names):
            raise ConfigError(f"tool_choice is {choice!r}, but the tools are {', '.join(names) or 'none'}")
        if converted:
            _ = self.engine.tool_format  # told now that there is none, rather than by the first call
        return self.bind(tools=converted, tool_choice=choice, parallel_tool_calls=parallel_tool_calls, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: StructuredOutputMethod = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """Have answers parsed into a schema.

        Args:
            schema: A pydantic class, a ``TypedDict``, a JSON schema or an OpenAI tool. None: with ``"json_mode"`` only.
            method: ``"json_schema"``: the answer is JSON of the schema, with any model. ``"function_calling"``: the
                schema is a tool that must be called, which also describes it to the model. ``"json_mode"``: as
                ``"json_schema"``, or any JSON object if there is no schema.
            include_raw: Give a dict of ``raw``, ``parsed`` and ``parsing_error``; nothing is raised for bad JSON.
            strict: Taken as OpenAI's models take it; answers fit the schema anyway.
            kwargs: Further settings of the calls.

        Raises:
            ConfigError: an unknown method, no schema where one is needed, a chat template without tools.
        """
        if method not in ("json_schema", "function_calling", "json_mode"):
            raise ConfigError(f"method must be json_schema, function_calling or json_mode, not {method!r}")
        if schema is None and method != "json_mode":
            raise ConfigError(f"method {method!r} needs a schema")
        told = {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
        pydantic_class = schema if isinstance(schema, type) and is_basemodel_subclass(schema) else None
        llm: Runnable[LanguageModelInput, AIMessage]
        parser: Runnable[Any, Any]
        if schema is None:
            llm = self.bind(structured_outputs={"json": {"type": "object"}}, **told, **kwargs)
            parser = _WholeJson()
        elif method != "function_calling":
            llm = self.bind(structured_outputs={"json": _json_schema(schema)}, **told, **kwargs)
            parser = _WholePydantic(pydantic_object=pydantic_class) if pydantic_class else _WholeJson()
        else:
            name = convert_to_openai_tool(schema)["function"]["name"]
            llm = self.bind_tools(
                [schema], tool_choice=name, parallel_tool_calls=False, strict=strict, **told, **kwargs
            )
            parser = _WholeCall(key_name=name, first_tool_only=True)
            if pydantic_class:
                parser = _WholePydanticCall(tools=[pydantic_class], first_tool_only=True)
        if not include_raw:
            return llm | parser
        parse = RunnablePassthrough.assign(
            parsed=operator.itemgetter("raw") | parser, parsing_error=lambda _: None
        ).with_fallbacks([RunnablePassthrough.assign(parsed=lambda _: None)], exception_key="parsing_error")
        return RunnableMap(raw=llm) | parse

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            chat, wanted = self._prepare(messages, stop, kwargs)
            return self._result(chat, [self.engine.generate(chat.prompt, **request) for request in wanted])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            # A server renders the messages, and tells the text of tokens.
            chat, wanted = await asyncio.to_thread(self._prepare, messages, stop, kwargs)
            answers = await asyncio.gather(*(self.engine.agenerate(chat.prompt, **request) for request in wanted))
            return await asyncio.to_thread(self._result, chat, answers)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with langchain_errors():
            chat, (request,) = self._prepare(messages, stop, {**kwargs, "n": 1})
            parser = chat.stream_parser()
            for piece in self.engine.stream(chat.prompt, **request):
                for chunk in self._chunks(parser, piece, piece.generation):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with langchain_errors():
            chat, (request,) = await asyncio.to_thread(self._prepare, messages, stop, {**kwargs, "n": 1})
            parser = chat.stream_parser()
            async for piece in self.engine.astream(chat.prompt, **request):
                for chunk in await asyncio.to_thread(self._chunks, parser, piece, piece.generation):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _prepare(
        self, messages: list[BaseMessage], stop: list[str] | None, settings: Mapping[str, Any]
    ) -> tuple[ChatPrompt, list[dict[str, Any]]]:
        """The prompt, and keyword arguments for the engine for each answer."""
        refuse_unknown(settings, ["blend", "n", *SAMPLING, *_CHAT_SETTINGS])
        request = {name: settings.get(name, getattr(self, name)) for name in SAMPLING}
        chat = prepare_chat(
            self.engine,
            _openai_messages(messages),
            tools=settings.get("tools"),
            tool_choice=_tool_choice(settings.get("tool_choice")),
            parallel_tool_calls=settings.get("parallel_tool_calls") is not False,
            structured_outputs=_structured_outputs(settings),
            continue_final_message=settings.get("continue_final_message", False),
            chat_template_kwargs={**self.chat_template_kwargs, **(settings.get("chat_template_kwargs") or {})},
            timeout=request["timeout"],
        )
        if stop is not None:
            request["stop"] = stop
        top = settings.get("top_logprobs", self.top_logprobs)
        if settings.get("logprobs", self.logprobs) or top:
            request["logprobs"] = top or 0
        request |= {**chat.sampling, "blend": override(self.blend, settings.get("blend"))}
        return chat, requests(request, settings.get("n", self.n))

    def _result(self, chat: ChatPrompt, answers: Sequence[Generation]) -> ChatResult:
        generations = [self._chat_generation(chat, answer) for answer in answers]
        return ChatResult(generations=generations, llm_output={"model_name": self.model})

    def _chat_generation(self, chat: ChatPrompt, answer: Generation) -> ChatGeneration:
        reply = chat.parse(answer.text)
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        for call in reply.tool_calls:
            arguments = json.loads(call.arguments)
            if isinstance(arguments, dict):
                calls.append(tool_call(name=call.name, args=arguments, id=call.id))
            else:
                error = "the arguments are no JSON object"
                invalid.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=error))
        metadata = self._metadata(answer, called=bool(calls))
        message = AIMessage(
            content=reply.content,
            tool_calls=calls,
            invalid_tool_calls=invalid,
            usage_metadata=_usage(answer),
            response_metadata=metadata,
        )
        return ChatGeneration(message=message, generation_info={"finish_reason": metadata["finish_reason"]})

    def _chunks(self, parser: ToolParser, piece: str, answer: Generation | None) -> list[ChatGenerationChunk]:
        """Chunks of a message, of a piece of a streamed answer; ``answer`` is the whole one, with the last piece.

        Calls come whole, at the end: of a part, LangChain would make a call whose arguments it completes by guessing.
        """
        texts = [delta.text for delta in parser.add(piece) if isinstance(delta, TextDelta)]
        chunks = [ChatGenerationChunk(message=AIMessageChunk(content=text)) for text in texts]
        if answer is None:
            return chunks
        deltas = parser.finish()
        reply = parser.parse(answer.text)
        rest = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
        if not reply.tool_calls and parser.called:  # begun and cut off
            rest = answer.text[parser.sent :]
        calls = [
            tool_call_chunk(name=call.name, args=call.arguments, id=call.id, index=index)
            for index, call in enumerate(reply.tool_calls)
        ]
        if rest or calls:
            chunks.append(ChatGenerationChunk(message=AIMessageChunk(content=rest, tool_call_chunks=calls)))
        metadata = self._metadata(answer, called=bool(calls))
        last = AIMessageChunk(
            content="", usage_metadata=_usage(answer), response_metadata=metadata, chunk_position="last"
        )
        info = {"finish_reason": metadata["finish_reason"]}
        return [*chunks, ChatGenerationChunk(message=last, generation_info=info)]

    def _metadata(self, answer: Generation, *, called: bool) -> dict[str, Any]:
        info = answer_info(self.engine, answer)
        if called and answer.finish_reason == "stop":
            info["finish_reason"] = "tool_calls"
        return {"model_name": self.model, "model_provider": "cacheblend", **info}


class _Whole:
    """Refuses an answer that was cut off, where LangChain's parsers would complete it by guessing, or say nothing."""

    def parse_result(self, result: list[LangChainGeneration], *, partial: bool = False) -> Any:
        """See :class:`BaseOutputParser`."""
        if not partial and _is_cut_off(result[0]):
            raise OutputParserException(
                "the answer was cut off at max_tokens before it was complete: raise max_tokens",
                llm_output=result[0].text,
            )
        return super().parse_result(result, partial=partial)  # type: ignore[misc]


class _WholeJson(_Whole, JsonOutputParser):
    """JSON."""


class _WholePydantic(_Whole, PydanticOutputParser[BaseModel]):
    """An object of a pydantic class."""


class _WholeCall(_Whole, JsonOutputKeyToolsParser):
    """The arguments of a tool call."""


class _WholePydanticCall(_Whole, PydanticToolsParser):
    """The arguments of a tool call, as an object of a pydantic class."""


def _is_cut_off(generation: LangChainGeneration) -> bool:
    message = generation.message if isinstance(generation, ChatGeneration) else None
    if not isinstance(message, AIMessage) or message.response_metadata.get("finish_reason") != "length":
        return False
    try:
        json.loads(generation.text)
    except ValueError:
        return not message.tool_calls
    return False  # complete with the last token


def _openai_messages(messages: list[BaseMessage]) -> list[dict[str, Any]]:
    converted = convert_to_openai_messages(messages)
    assert isinstance(converted, list)  # of a list comes a list
    return converted


def _tool_choice(choice: str | bool | Mapping[str, Any] | None) -> str:
    if choice is None or choice is False:
        return "auto"
    if choice is True or choice == "any":
        return "required"
    if isinstance(choice, Mapping):
        name = choice.get("function", choice).get("name") or choice.get("type")
        return "required" if name in ("any", "required") else str(name)
    return str(choice)


def _structured_outputs(settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What constrains a call's answer, whichever way it is said."""
    wanted: Mapping[str, Any] | None = settings.get("structured_outputs")
    response_format = settings.get("response_format")
    if response_format is None or response_format == {"type": "text"}:
        return wanted
    if wanted is not None:
        raise ConfigError("response_format and structured_outputs both say what the answer must be: give one of them")
    if isinstance(response_format, type):
        return {"json": _json_schema(response_format)}
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_object":
        return {"json": {"type": "object"}}
    if isinstance(response_format, Mapping) and response_format.get("type") == "json_schema":
        return {"json": response_format.get("json_schema", {}).get("schema")}
    raise ConfigError(f"response_format must be of type text, json_object or json_schema, not {response_format!r}")


def _json_schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()  # LangChain's conversion cuts recursive ones off
    return convert_to_json_schema(schema)


def _usage(answer: Generation) -> UsageMetadata:
    stats, written = answer.stats, len(answer.token_ids)
    details: Any = {
        "cache_read": stats.prefix_tokens + stats.reused_tokens,
        "cacheblend_recomputed": stats.recomputed_tokens,
        "cacheblend_missed": stats.missed_tokens,
    }
    return UsageMetadata(
        input_tokens=stats.prompt_tokens,
        output_tokens=written,
        total_tokens=stats.prompt_tokens + written,
        input_token_details=details,
    )
