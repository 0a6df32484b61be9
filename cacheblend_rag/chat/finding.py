"""Finds tool calls in text that may not be complete yet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from cacheblend_rag.chat.tool_format import ToolFormat


def find_calls(tool_format: ToolFormat, text: str) -> Iterator[tuple[str, str]]:
    """Names and arguments (JSON text) of calls, in order. The arguments of the last one may not be complete.

    Args:
        tool_format: How calls are written.
        text: Begins with the first call's marker.

    Raises:
        ValueError: after the last call that was found: the text is cut off there, or isn't as calls are written.
    """
    try:
        if tool_format.in_json:
            for start in _json_starts(tool_format, text):
                yield from _calls_in_json(text, start)
        else:
            yield from _calls_around_json(tool_format, text)
    except (KeyError, TypeError, RecursionError) as error:  # JSON of another kind, or too deep for Python
        raise ValueError(f"no tool call: {error!r}") from error


def _json_starts(tool_format: ToolFormat, text: str) -> Iterator[int]:
    """Where each JSON value stands that holds a call, or several in a list."""
    marker, call_marker = re.escape(tool_format.marker), re.escape(tool_format.call_marker)
    begin = marker if call_marker == marker else rf"{marker}\s*{call_marker}"
    start: int | None = _json_start(text, re.compile(begin).match(text))
    while start is not None:
        yield start
        end = _end_of_value(text, start)
        assert end is not None  # or it would have been an error
        if call_marker:
            following = re.compile(call_marker).search(text, end)
        elif marker:
            separator, closing = (re.escape(part.strip()) for part in (tool_format.separator, tool_format.closing))
            again = rf"\s*(?:{separator}|(?:{closing})?\s*{marker})\s*(?=[{{\[])"
            following = re.compile(again).match(text, end)
        else:
            following = re.compile(r"[^{\[]*(?=[{\[])").match(text, end)
        start = None if following is None else _json_start(text, following)


def _json_start(text: str, marker: re.Match[str] | None) -> int:
    """Where the JSON value begins that follows a marker."""
    found = re.compile(r"\s*(?=[{\[])").match(text, 0 if marker is None else marker.end())
    if found is None:
        raise ValueError("a tool call is cut off, or no JSON")
    return found.end()


def _calls_in_json(text: str, start: int) -> Iterator[tuple[str, str]]:
    """The calls of a JSON value: ``{"name": ..., "arguments": ...}``, or a list of such objects."""
    if text[start] == "{":
        yield _call_in_object(text, start)
    else:
        at = start + 1
        while (element := re.compile(r"[\s,]*(?={)").match(text, at)) is not None:
            yield _call_in_object(text, element.end())
            at = _end_of_value(text, element.end()) or len(text)
    end = _end_of_value(text, start)
    if end is None:
        raise ValueError("a tool call is cut off")
    value = json.loads(text[start:end])
    if isinstance(value, list) and not all(isinstance(call, dict) for call in value):
        raise TypeError(value)


def _call_in_object(text: str, start: int) -> tuple[str, str]:
    ordinary = _NAME_FIRST.match(text, start)
    if ordinary is not None:  # its arguments can be told before the object is complete
        return ordinary["name"], text[ordinary.end() : _end_of_value(text, ordinary.end())]
    end = _end_of_value(text, start)
    if end is None:
        raise ValueError("a tool call is cut off")
    call = json.loads(text[start:end])
    name, arguments = call["name"], call["arguments"] if "arguments" in call else call["parameters"]
    if isinstance(arguments, str):  # as OpenAI has them
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError(call)
    return name, json.dumps(arguments, ensure_ascii=False)


def _calls_around_json(tool_format: ToolFormat, text: str) -> Iterator[tuple[str, str]]:
    """Calls whose name stands before the JSON."""
    before, middle = (re.escape(part.strip()) for part in (tool_format.before_name, tool_format.before_arguments))
    call_start = re.compile(rf"{before}\s*(?P<name>[\w.-]+?)\s*{middle}\s*(?={{)")
    at = 0
    while (found := call_start.search(text, at)) is not None:
        end = _end_of_value(text, found.end())
        yield found["name"], text[found.end() : end]
        if end is None:
            raise ValueError("a tool call is cut off")
        json.loads(text[found.end() : end])
        at = end
    if tool_format.call_marker and tool_format.call_marker in text[at:]:
        raise ValueError("a tool call is cut off")


_NAME_FIRST = re.compile(r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)
_NESTING = {"{": 1, "[": 1, "}": -1, "]": -1}


def _end_of_value(text: str, start: int) -> int | None:
    """Where the JSON object or list that starts there ends; None if it isn't complete."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text, start):
        depth += _NESTING.get(token[0], 0)
        if depth == 0:
            return token.end()
    return None
