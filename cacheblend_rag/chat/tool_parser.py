"""Reads tool calls out of an answer, whole or while it streams."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid

from cacheblend_rag.chat.finding import find_calls
from cacheblend_rag.chat.tool_format import ToolFormat


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        id: Made here; nine letters and digits, as all chat templates take them.
        name: The tool.
        arguments: A JSON object, as text.
    """

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class ChatReply:
    """A whole answer.

    Attributes:
        content: Its text, up to the first call.
        tool_calls: Its calls.
    """

    content: str
    tool_calls: tuple[ToolCall, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """More of an answer's text."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """More of a tool call.

    Attributes:
        index: Which call of the answer, from 0.
        id: With the first delta of a call, otherwise None.
        name: With the first delta of a call, otherwise None.
        arguments: JSON text to append to what came before.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


class ToolParser:
    """Reads one answer.

    An answer that looks like calls and is none (cut off, or broken JSON) is text, as with vLLM's parsers. What was
    told of a call while the answer streamed is not taken back, though.

    Args:
        tool_format: Of the model's chat template; None: answers are text.

    Attributes:
        sent: Characters of the streamed answer that were told as text.
    """

    def __init__(self, tool_format: ToolFormat | None) -> None:
        self._format = tool_format
        self._text = ""
        self.sent = 0
        self._ids: list[str] = []  # of the calls begun
        self._sent_arguments: list[str] = []

    @property
    def called(self) -> bool:
        """Whether the streamed answer has calls."""
        return bool(self._ids)

    def parse(self, text: str) -> ChatReply:
        """Read a whole answer."""
        begin = self._begin(text)
        if begin is None or self._format is None:
            return ChatReply(text)
        try:
            calls = tuple(ToolCall(_new_id(), *call) for call in find_calls(self._format, text[begin:]))
        except ValueError:
            return ChatReply(text)
        return ChatReply(text[:begin], calls) if calls else ChatReply(text)

    def add(self, piece: str) -> list[TextDelta | ToolCallDelta]:
        """Read the next piece of a streamed answer."""
        self._text += piece
        begin = self._begin(self._text)
        if begin is None or self._format is None:
            return self._text_up_to(len(self._text) - self._may_begin())
        deltas = self._text_up_to(begin)
        with contextlib.suppress(ValueError):  # not complete yet, or none after all
            for index, (name, arguments) in enumerate(find_calls(self._format, self._text[begin:])):
                deltas += self._call_deltas(index, name, arguments)
        return deltas

    def finish(self) -> list[TextDelta | ToolCallDelta]:
        """What was held back, once no more comes."""
        return [] if self.called else self._text_up_to(len(self._text))

    def _text_up_to(self, end: int) -> list[TextDelta | ToolCallDelta]:
        text, self.sent = self._text[self.sent : end], max(self.sent, end)
        return [TextDelta(text)] if text else []

    def _call_deltas(self, index: int, name: str, arguments: str) -> list[TextDelta | ToolCallDelta]:
        """What is new of a call."""
        if index == len(self._ids):
            self._ids.append(_new_id())
            self._sent_arguments.append(arguments)
            return [ToolCallDelta(index, self._ids[index], name, arguments)]
        new = arguments[len(self._sent_arguments[index]) :]
        self._sent_arguments[index] = arguments
        return [ToolCallDelta(index, None, None, new)] if new else []

    def _begin(self, text: str) -> int | None:
        """Where calls begin; None if there are none, or none yet."""
        if self._format is None:
            return None
        if self._format.marker:
            at = text.find(self._format.marker)
            return at if at >= 0 else None
        # Nothing but JSON tells calls from text: the answer has to start with it.
        start = len(text) - len(text.lstrip())
        return start if text[start : start + 1] in ("{", "[") else None

    def _may_begin(self) -> int:
        """Characters at the end of the text that may be the beginning of a marker."""
        marker = self._format.marker if self._format is not None else ""
        return max((n for n in range(1, len(marker)) if self._text.endswith(marker[:n])), default=0)


def _new_id() -> str:
    return uuid.uuid4().hex[:9]
