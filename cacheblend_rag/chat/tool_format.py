"""How a chat template writes tool calls, found out by having it write some.

Templates differ: ``<tool_call>{"name": ..., "arguments": ...}</tool_call>`` (Hermes, Qwen),
``{"name": ..., "parameters": ...}`` (Llama 3), ``[TOOL_CALLS][{...}, {...}]`` (Mistral), and so on. All of them write a
name and JSON arguments with fixed text around them. A conversation with one call and one with two calls tell that text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.structured import const, json_content, tag_of

ID_PATTERN = "[a-zA-Z0-9]{9}"
"""Identifiers of tool calls as all templates take them (Mistral's take no others)."""

_USER = {"role": "user", "content": "question"}
_NAMES = ("probe_tool_one", "probe_tool_two")
_ARGUMENTS = {"probe_argument": "probe value"}
_IDS = ("probeid01", "probeid02")
_ANSWER = "An answer."  # begins like no call


class RenderChat(Protocol):
    """As :meth:`cacheblend_rag.engines.base.Engine.render_chat`."""

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Messages as one prompt text."""


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """The text of tool calls.

    ::

        opening  before_name NAME before_arguments ARGUMENTS after_arguments  separator  before_name ...  closing

    Attributes:
        opening: Once, before the first call.
        before_name: Before each name.
        before_arguments: Between each name and its arguments.
        after_arguments: After each call's arguments; where the call's identifier stands there, ``after_id`` follows it.
        after_id: None if the format has no identifiers after the arguments.
        separator: Between two calls.
        closing: Once, after the last call.
        marker: What begins calls and nothing else, such as ``<tool_call>``; empty if there is no such text. Without
            the space around it.
        call_marker: The same of each call; empty if nothing but a separator stands between calls.
        in_json: Whether the name stands within a JSON object, beside the arguments.
        single: Whether the template takes no more than one call in a message.
    """

    opening: str
    before_name: str
    before_arguments: str
    after_arguments: str
    after_id: str | None
    separator: str
    closing: str
    marker: str
    call_marker: str
    in_json: bool
    single: bool

    def constraint(self, tools: Sequence[Mapping[str, Any]], *, required: bool, parallel: bool) -> str | None:
        """The structural tag of answers that may call tools: every call must fit its tool's schema.

        Args:
            tools: In OpenAI's format.
            required: The answer is at least one call and nothing else; otherwise text, with or without calls.
            parallel: There may be several calls.

        Returns:
            None where text can't be told from calls before it is complete, and nothing is required.
        """
        calls = {
            "type": "tags_with_separator",
            "tags": [self._tag(tool) for tool in tools],
            "separator": self.separator,
            "at_least_one": True,
            "stop_after_first": self.single or not parallel,
        }
        wrapped = {"type": "tag", "begin": self.opening, "content": calls, "end": self.closing}
        is_wrapped = bool(self.opening)
        if required:
            return json.dumps(tag_of(wrapped if is_wrapped else calls))
        if not self.marker:
            return None
        content = {
            "type": "triggered_tags",
            "triggers": [self.marker],
            "tags": [wrapped] if is_wrapped else calls["tags"],
            "at_least_one": False,
            # What is around all calls ends them.
            "stop_after_first": is_wrapped or calls["stop_after_first"],
        }
        return json.dumps(tag_of(content))

    def _tag(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = tool["function"]
        arguments = json_content(function.get("parameters") or {"type": "object", "properties": {}})
        begin = self.before_name + function["name"] + self.before_arguments
        if self.after_id is None:
            return {"type": "tag", "begin": begin, "content": arguments, "end": self.after_arguments}
        identifier = {"type": "regex", "pattern": ID_PATTERN}
        content = {"type": "sequence", "elements": [arguments, const(self.after_arguments), identifier]}
        return {"type": "tag", "begin": begin, "content": content, "end": self.after_id}


def find_tool_format(render_chat: RenderChat, model_name: str) -> ToolFormat:
    """How a model's template writes tool calls.

    Args:
        render_chat: Renders messages by the template.
        model_name: For the error.

    Raises:
        ConfigError: the template has no tools, or calls that are no JSON.
    """
    tools = [_tool(name) for name in _NAMES]

    def past(message: Mapping[str, Any]) -> str:
        return render_chat([_USER, message], tools=tools, add_generation_prompt=False)

    try:
        prompt = render_chat([_USER], tools=tools)
        answer = past({"role": "assistant", "content": _ANSWER})
        one = past(_calling(1))
    except ConfigError as error:
        raise _unreadable(model_name, str(error)) from error
    try:
        two = past(_calling(2))
    except ConfigError:  # some templates refuse more than one call in a message
        two = ""
    if not all(name in prompt for name in _NAMES):
        raise _unreadable(model_name, "it does not show tools to the model")
    # Where the model's own text begins and what ends its turn, the same for text and for calls.
    begin = len(_common_start(one, answer))
    end_of_turn = answer.rpartition(_ANSWER)[2].strip()
    first = _pieces(_without_end(one[begin:], end_of_turn), 1)
    several = _NAMES[1] in two[begin:]
    both = _pieces(_without_end(two[begin:], end_of_turn), 2) if several else []
    if len(first) != 3 or (several and len(both) != 5):
        raise _unreadable(model_name, "its tool calls are not a name and JSON arguments")
    return _fit(model_name, first[0].lstrip(), first[1], first[2], both[2] if several else None)


def _without_end(turn: str, end_of_turn: str) -> str:
    """A turn of the model without what ends it."""
    return turn.rstrip().removesuffix(end_of_turn)


def _pieces(text: str, count: int) -> list[str]:
    """The text before, between and after the names and arguments of some calls; shorter if one isn't found."""
    pieces = []
    for name in _NAMES[:count]:
        before, found, text = text.partition(name)
        arguments_at = text.find("{")
        if not found or arguments_at < 0:
            return []
        try:
            arguments, length = json.JSONDecoder().raw_decode(text[arguments_at:])
        except ValueError:
            return []
        if arguments != _ARGUMENTS:
            return []
        pieces += [before, text[:arguments_at]]
        text = text[arguments_at + length :]
    return [*pieces, text]


def _fit(model_name: str, before: str, middle: str, after: str, between: str | None) -> ToolFormat:
    """The format in which one call is ``before NAME middle ARGUMENTS after``.

    Args:
        model_name: For the error.
        before: See above.
        middle: See above.
        after: See above.
        between: Two calls have this between the arguments of the first and the name of the second; None: there is
            never more than one.
    """
    if any(id_ in before + middle for id_ in _IDS):
        raise _unreadable(model_name, "its tool calls have an identifier before their arguments")
    opening = separator = closing = ""
    if between is not None:
        if between.startswith(after) and between.endswith(before) and len(between) >= len(after) + len(before):
            separator = between[len(after) : len(between) - len(before)]
        else:  # a list: what calls have in common is theirs, the rest is around them all
            per_call = _common_start(before[::-1], between[::-1])[::-1]
            if "<" in before[: len(before) - len(per_call)].rpartition(">")[2]:  # ends of tags are alike too
                per_call = per_call.partition(">")[2]
            opening, before = before[: len(before) - len(per_call)], per_call
            between = between[: len(between) - len(before)]
            per_call = _common_start(after, between)
            separator, closing, after = between[len(per_call) :], after[len(per_call) :], per_call
    start = opening + before
    whole = start + _NAMES[0] + middle + json.dumps(_ARGUMENTS) + after + closing
    json_at = next((at for at in range(len(start)) if start[at] in "{[" and _is_json_at(whole, at)), len(start))
    in_json = json_at < len(start)
    if not in_json and not start.strip():
        raise _unreadable(model_name, "nothing tells its tool calls from text")
    call_marker = start[len(opening) : json_at].strip()
    after, has_id, after_id = after.partition(_IDS[0])
    return ToolFormat(
        opening=opening,
        before_name=before,
        before_arguments=middle,
        after_arguments=after,
        after_id=after_id if has_id else None,
        separator=separator,
        closing=closing,
        marker=opening[:json_at].strip() or call_marker,
        call_marker=call_marker,
        in_json=in_json,
        single=between is None,
    )


def _common_start(one: str, other: str) -> str:
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _is_json_at(text: str, at: int) -> bool:
    try:
        json.JSONDecoder().raw_decode(text[at:])
    except ValueError:
        return False
    return True


def _tool(name: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": "an argument"} for argument in _ARGUMENTS}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "a tool", "parameters": parameters}}


def _calling(count: int) -> dict[str, Any]:
    """A message with some calls."""
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": json.dumps(_ARGUMENTS)}}
        for id_, name in zip(_IDS, _NAMES, strict=True)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls[:count]}


def _unreadable(model_name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"the chat template of {model_name!r} can't be used with tools: {reason}. Give chat_template=<one with tools>"
    )
