"""Finds tool calls in text that grows, looking at each character a few times at most."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Generator
from typing import TypeVar

from cacheblend_rag.chat.tool_format import ToolFormat

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class CallPart:
    """A tool call, or more of the arguments of the last one.

    Attributes:
        name: Of a new call; None: this is more of the last one.
        arguments: JSON text.
    """

    name: str | None
    arguments: str


_Search = Generator[CallPart | None, None, _T]


class CallFinder:
    """Finds the calls of an answer, however it is cut into pieces.

    What isn't as calls are written ends the search; what was found before stays.

    Args:
        tool_format: How calls are written.

    Attributes:
        text: What was added; it has to begin with the first call's marker.
        is_whole: It holds calls and nothing that is cut off or broken. It may go on nevertheless.
    """

    def __init__(self, tool_format: ToolFormat) -> None:
        self.text = ""
        self.is_whole = False
        self._format = tool_format
        self._search = self._calls_in_json() if tool_format.in_json else self._calls_around_json()

    def add(self, piece: str) -> list[CallPart]:
        """Add text; returns what it holds of calls."""
        self.text += piece
        found = []
        try:
            while piece and (part := next(self._search, None)) is not None:
                found.append(part)
        except (ValueError, KeyError, TypeError, RecursionError):  # no JSON, JSON of another kind, too deep for Python
            self.is_whole = False
        return found

    # The search is a generator. It yields what it finds, and None where it needs more text.

    def _calls_in_json(self) -> _Search[None]:
        """JSON values after markers, each of them a call or a list of calls."""
        marker, call_marker = self._format.marker, self._format.call_marker
        at = len(marker)
        if call_marker != marker:
            at = yield from self._skip(_SPACE, at)
            while len(self.text) < at + len(call_marker):
                yield None
            if not self.text.startswith(call_marker, at):
                raise ValueError("no tool call")
            at += len(call_marker)
        while True:
            start = yield from self._skip(_SPACE, at)
            end = yield from self._value(start)
            self.is_whole = True
            at = yield from self._next_value(end)
            self.is_whole = False

    def _next_value(self, at: int) -> _Search[int]:
        """Where what stands before the next JSON value ends."""
        marker, call_marker = self._format.marker, self._format.call_marker
        if call_marker:
            while (found := self.text.find(call_marker, at)) < 0:
                at = max(at, len(self.text) - len(call_marker) + 1)
                yield None
            return found + len(call_marker)
        if not marker:
            at = yield from self._skip(_NO_JSON, at)
            return at
        separator, closing = (re.escape(part.strip()) for part in (self._format.separator, self._format.closing))
        again = re.compile(rf"\s*(?:{separator}|(?:{closing})?\s*{re.escape(marker)})\s*(?=[{{\[])")
        while (following := again.match(self.text, at)) is None:
            yield None
        return following.end()

    def _value(self, start: int) -> _Search[int]:
        """``{"name": ..., "arguments": ...}``, or a list of such objects; returns where it ends."""
        if self.text[start] == "{":
            end = yield from self._object(start)
            json.loads(self.text[start:end])
            return end
        if self.text[start] != "[":
            raise ValueError("no tool call")
        at = yield from self._skip(_SPACE_OR_COMMA, start + 1)
        while self.text[at] == "{":
            at = yield from self._object(at)
            at = yield from self._skip(_SPACE_OR_COMMA, at)
        end = yield from self._end(start)
        if not all(isinstance(call, dict) for call in json.loads(self.text[start:end])):
            raise TypeError("no tool calls")
        return end

    def _object(self, start: int) -> _Search[int]:
        """One call; returns where it ends."""
        value = _Value(start)
        while (ordinary := _NAME_FIRST.match(self.text, start)) is None and (end := value.end(self.text)) is None:
            yield None
        if ordinary is not None:  # its arguments can be told before the object is complete
            yield from self._arguments(ordinary["name"], ordinary.end())
            end = yield from self._end(start)
            return end
        call = json.loads(self.text[start:end])
        name, arguments = call["name"], call["arguments"] if "arguments" in call else call["parameters"]
        if isinstance(arguments, str):  # as OpenAI has them
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError("no tool call")
        yield CallPart(name, json.dumps(arguments, ensure_ascii=False))
        assert end is not None
        return end

    def _calls_around_json(self) -> _Search[None]:
        """Calls whose name stands before the JSON."""
        before, middle = self._format.before_name.strip(), self._format.before_arguments.strip()
        call_start = re.compile(rf"{re.escape(before)}\s*(?P<name>[\w.-]+?)\s*{re.escape(middle)}\s*(?={{)")
        at = 0
        while True:
            while (found := call_start.search(self.text, at)) is None:
                begun = self.text.find(before, at)
                self.is_whole = begun < 0 or not before
                at = begun if begun >= 0 else max(at, len(self.text) - len(before) + 1)
                yield None
            self.is_whole = False
            at = yield from self._arguments(found["name"], found.end())
            json.loads(self.text[found.end() : at])

    def _arguments(self, name: str, start: int) -> _Search[int]:
        """Arguments as they come; returns where they end."""
        value = _Value(start)
        end = value.end(self.text)
        yield CallPart(name, self.text[start:end])
        while end is None:
            told = len(self.text)
            yield None
            end = value.end(self.text)
            yield CallPart(None, self.text[told:end])
        return end

    def _end(self, start: int) -> _Search[int]:
        """Where the JSON value that starts there ends."""
        value = _Value(start)
        while (end := value.end(self.text)) is None:
            yield None
        return end

    def _skip(self, characters: re.Pattern[str], at: int) -> _Search[int]:
        """The next place where another character stands."""
        while True:
            skipped = characters.match(self.text, at)
            assert skipped is not None  # it may be none
            at = skipped.end()
            if at < len(self.text):
                return at
            yield None


class _Value:
    """Looks for the end of the JSON object or list that starts at a place, each time from where it came to."""

    def __init__(self, start: int) -> None:
        self._at = start
        self._depth = 0
        self._in_string = False

    def end(self, text: str) -> int | None:
        """Where it ends; None if it isn't complete."""
        while (found := (_IN_STRING if self._in_string else _OUTSIDE).search(text, self._at)) is not None:
            self._at = found.end()
            if found[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if found[0] in "{[" else -1
                if self._depth == 0:
                    return self._at
        half_escape = self._in_string and text.endswith("\\") and self._at < len(text)
        self._at = len(text) - half_escape
        return None


_NAME_FIRST = re.compile(r'\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_SPACE, _SPACE_OR_COMMA, _NO_JSON = re.compile(r"\s*"), re.compile(r"[\s,]*"), re.compile(r"[^{\[]*")
_OUTSIDE, _IN_STRING = re.compile(r'["{}\[\]]'), re.compile(r'"|\\.', re.DOTALL)
