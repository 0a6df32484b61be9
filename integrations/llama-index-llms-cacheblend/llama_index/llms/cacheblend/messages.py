"""Between LlamaIndex's messages, tools and responses, and what ``cacheblend_rag`` takes and gives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cacheblend_rag.chat import ChatReply, TextDelta, ToolCall, ToolCallDelta
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import Generation
from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.utils import parse_partial_json

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

# Roles that chat templates don't know, as those that they do.
_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_openai(message: ChatMessage) -> dict[str, Any]:
    """A message in OpenAI's format. Thoughts of the model are left out.

    Raises:
        ConfigError: it holds something else than text and tool calls.
    """
    texts = []
    calls = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolCallBlock):
            calls.append(_openai_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
        elif not isinstance(block, ThinkingBlock | CachePoint):
            raise ConfigError(f"a message holds a {block.block_type} block, but the model reads text only")
    role = _ROLES.get(message.role, message.role.value)
    result: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if role == "assistant" and calls:
        result["tool_calls"] = calls
    if role == "tool":
        for name in ("tool_call_id", "name"):
            if value := message.additional_kwargs.get(name):
                result[name] = value
    return result


def to_openai_tool(tool: BaseTool) -> dict[str, Any]:
    """A tool in OpenAI's format, under the name by which LlamaIndex will look it up."""
    metadata = tool.metadata
    described = metadata.to_openai_tool(skip_length_check=True)
    return {**described, "function": {**described["function"], "name": metadata.get_name()}}


def tool_choice(choice: str | Mapping[str, Any] | None, required: bool) -> str:
    """``"auto"``, ``"none"``, ``"required"`` or a tool's name, from what LlamaIndex's callers pass.

    Args:
        choice: One of these, OpenAI's ``{"type": "function", "function": {"name": ...}}``, or None.
        required: What None means: a call is required, or not.
    """
    if choice is None:
        return "required" if required else "auto"
    if isinstance(choice, str):
        return "required" if choice == "any" else choice
    try:
        return str(choice["function"]["name"])
    except (KeyError, TypeError):
        raise ConfigError(f"tool_choice must be a tool's name, auto, none or required, not {choice!r}") from None


def assistant_message(text: str, calls: Sequence[ToolCall]) -> ChatMessage:
    """The model's answer. Arguments of a call may still be incomplete JSON: what there is of them counts."""
    blocks: list[ContentBlock] = [TextBlock(text=text)] if text or not calls else []
    blocks += [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=_arguments(call.arguments))
        for call in calls
    ]
    # LlamaIndex's structured streaming looks for them here.
    extra = {"tool_calls": [_openai_call(call.id, call.name, call.arguments) for call in calls]} if calls else {}
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=extra)


def tool_selections(message: ChatMessage) -> list[ToolSelection]:
    """The tool calls in an answer."""
    return [
        ToolSelection(
            tool_id=block.tool_call_id or "",
            tool_name=block.tool_name,
            tool_kwargs=_arguments(block.tool_kwargs) if isinstance(block.tool_kwargs, str) else block.tool_kwargs,
        )
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]


class PartialReply:
    """An answer as far as it has streamed.

    Attributes:
        text: Its text.
        calls: Its tool calls; the last one may be incomplete.
    """

    def __init__(self) -> None:
        self.text = ""
        self.calls: list[ToolCall] = []

    def add(self, deltas: Sequence[TextDelta | ToolCallDelta]) -> str:
        """Take in what is new; returns the new text."""
        new = ""
        for delta in deltas:
            if isinstance(delta, TextDelta):
                new += delta.text
            elif delta.index == len(self.calls):
                self.calls.append(ToolCall(delta.id or "", delta.name or "", delta.arguments))
            else:
                call = self.calls[delta.index]
                self.calls[delta.index] = ToolCall(call.id, call.name, call.arguments + delta.arguments)
        self.text += new
        return new

    def finish(self, whole: ChatReply) -> str:
        """Become the whole answer, calls keeping their ids; returns the new text.

        A call that was cut off is text now: nobody must run it.
        """
        new = whole.content.removeprefix(self.text)
        begun = [call.id for call in self.calls]
        self.calls = [
            ToolCall(begun[n] if n < len(begun) else call.id, call.name, call.arguments)
            for n, call in enumerate(whole.tool_calls)
        ]
        self.text = whole.content
        return new


def report(answer: Generation) -> dict[str, Any]:
    """How a prompt was read and answered, as plain values: ``additional_kwargs`` of a response."""
    return {
        "finish_reason": answer.finish_reason,
        "decision": answer.stats.decision,
        "ttft": answer.stats.ttft,
        "stats": answer.stats.to_dict(),
        "usage": usage(answer),
    }


def raw(answer: Generation) -> dict[str, Any]:
    """A whole generation as plain values: ``raw`` of a response."""
    return {**report(answer), "text": answer.text, "token_ids": answer.token_ids, "logprobs": answer.logprobs}


def usage(answer: Generation) -> dict[str, int]:
    """Tokens read and written, named as in OpenAI's API, and how many of those read were reused."""
    read, written = answer.stats.prompt_tokens, len(answer.token_ids)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "reused_tokens": answer.stats.prefix_tokens + answer.stats.reused_tokens,
    }


def logprobs(engine: Engine, answer: Generation) -> list[list[LogProb]] | None:
    """For each generated token the most likely ones, best first; None where they weren't asked for.

    Asks a server for the texts of the tokens.
    """
    if answer.logprobs is None:
        return None
    texts = {token: engine.decode([token]) for token in {token for tops in answer.logprobs for token in tops}}
    return [
        [
            LogProb(token=texts[token], logprob=value, bytes=list(texts[token].encode()))
            for token, value in sorted(tops.items(), key=lambda item: -item[1])
        ]
        for tops in answer.logprobs
    ]


def _openai_call(call_id: str | None, name: str, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id or "", "type": "function", "function": {"name": name, "arguments": text}}


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = parse_partial_json(text)
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
