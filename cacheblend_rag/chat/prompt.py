"""From messages and tools to what an engine is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cacheblend_rag.chat.tool_format import ToolFormat
from cacheblend_rag.chat.tool_parser import ChatReply, ToolParser
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.structured import either, structural_tag

# Thoughts of earlier turns, which templates leave out too, and calls, which ``tool_calls`` has.
_LEFT_OUT = ("thinking", "redacted_thinking", "reasoning", "tool_call", "tool_call_chunk", "invalid_tool_call")


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """What to ask an engine for, and how to read its answer.

    ::

        chat = prepare_chat(engine, messages, tools=tools)
        reply = chat.parse(engine.generate(chat.prompt, **chat.sampling, max_tokens=200).text)

    Attributes:
        prompt: The messages, by the model's chat template.
        sampling: Settings for ``engine.generate`` that constrain the answer; may be empty.
        tool_format: How its tool calls are written; None if it has none.
    """

    prompt: str
    sampling: Mapping[str, Any]
    tool_format: ToolFormat | None

    def parse(self, text: str) -> ChatReply:
        """Read a whole answer."""
        return self.stream_parser().parse(text)

    def stream_parser(self) -> ToolParser:
        """A parser for an answer that streams."""
        return ToolParser(self.tool_format)


def prepare_chat(
    engine: Engine,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str = "auto",
    parallel_tool_calls: bool = True,
    structured_outputs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    timeout: float | None = None,
) -> ChatPrompt:
    """Prepare a chat completion. With a server this asks it to render its template.

    Args:
        engine: Answers later.
        messages: In OpenAI's format; content may be text or a list of text blocks.
        tools: In OpenAI's format.
        tool_choice: ``"auto"``: text or calls. ``"none"``: text. ``"required"``: at least one call. A tool's name: a
            call of that tool.
        parallel_tool_calls: There may be several calls.
        structured_outputs: What the answer must look like, see :func:`cacheblend_rag.structured.structural_tag`,
            unless it calls tools.
        continue_final_message: The answer goes on with the last message, which is the assistant's.
        chat_template_kwargs: Further variables of the chat template, such as ``enable_thinking``.
        timeout: Seconds to wait for a server that renders; None: what its client was given.

    Raises:
        ConfigError: messages that are no text, an unknown tool, two constraints at once, a chat template without tools.
    """
    tools = tools or ()
    names = [_name(tool) for tool in tools]
    if tool_choice not in ("auto", "none", *(["required"] if tools else []), *names):
        raise ConfigError(f"tool_choice is {tool_choice!r}, but the tools are {', '.join(names) or 'none'}")
    required = tool_choice not in ("auto", "none")
    if structured_outputs is not None and required:
        raise ConfigError("tool_choice and structured_outputs both say what the answer must be: give one of them")
    rendered = engine.render_chat(
        [_text_message(message) for message in messages],
        tools=tools or None,
        add_generation_prompt=not continue_final_message,
        continue_final_message=continue_final_message,
        chat_template_kwargs=chat_template_kwargs,
        timeout=timeout,
    )
    sampling: dict[str, Any] = {}
    if structured_outputs is not None:
        sampling["structured_outputs"] = structured_outputs
    if not tools or tool_choice == "none":
        return ChatPrompt(rendered, sampling, None)
    chosen = [tool for tool, name in zip(tools, names, strict=True) if name == tool_choice]
    tool_format = engine.tool_format
    tag = tool_format.constraint(
        chosen or tools,
        required=required or structured_outputs is not None,
        parallel=parallel_tool_calls and not chosen,
    )
    if structured_outputs is not None:
        assert tag is not None  # what is required can be told
        sampling["structured_outputs"] = {"structural_tag": either(structural_tag(structured_outputs), tag)}
    elif tag is not None:
        sampling["structured_outputs"] = {"structural_tag": tag}
    # What marks a call is a special token in some models.
    return ChatPrompt(rendered, sampling | {"skip_special_tokens": False}, tool_format)


def _name(tool: Mapping[str, Any]) -> str:
    """The name of a tool in OpenAI's format."""
    try:
        name = tool["function"]["name"]
    except (KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise ConfigError(f'a tool must be {{"type": "function", "function": {{"name": ..., ...}}}}, not {tool!r}')
    return name


def _text_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one text."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return {**message, "content": content or ""}
    if not isinstance(content, Sequence):
        raise ConfigError(f"the content of a message must be text or a list of text blocks, not {content!r}")
    texts = [_text(part) for part in content if not (isinstance(part, Mapping) and part.get("type") in _LEFT_OUT)]
    return {**message, "content": "\n".join(texts)}


def _text(block: Any) -> str:
    """The text of a part of a message's content."""
    kind, text = (block.get("type"), block.get("text")) if isinstance(block, Mapping) else ("text", block)
    if kind != "text" or not isinstance(text, str):
        raise ConfigError(f"a message holds a {kind!r} block, but the model reads text only")
    return text
