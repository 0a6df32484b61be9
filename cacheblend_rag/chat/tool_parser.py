"""Reads tool calls out of an answer, whole or while it streams."""

from __future__ import annotations

import dataclasses
import uuid

from cacheblend_rag.chat.finding import CallFinder, CallPart
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
        self.sent = 0
        self._held = ""  # text that may be the beginning of a marker
        self._began_as_text = False
        self._finder: CallFinder | None = None  # once there is a marker
        self._calls = 0

    @property
    def called(self) -> bool:
        """Whether the streamed answer has calls."""
        return self._calls > 0

    def parse(self, text: str) -> ChatReply:
        """Read a whole answer."""
        begin = self._begin(text)
        if begin is None or self._format is None:
            return ChatReply(text)
        finder = CallFinder(self._format)
        parts = finder.add(text[begin:])
        if not parts or not finder.is_whole:
            return ChatReply(text)
        # Of text that is all there, each part is a call.
        calls = (ToolCall(_new_id(), part.name, part.arguments) for part in parts if part.name is not None)
        return ChatReply(text[:begin], tuple(calls))

    def add(self, piece: str) -> list[TextDelta | ToolCallDelta]:
        """Read the next piece of a streamed answer."""
        if self._finder is not None:
            return [self._call_delta(part) for part in self._finder.add(piece)]
        text = self._held + piece
        begin = self._begin(text)
        if begin is None or self._format is None or (self._began_as_text and not self._format.marker):
            self._began_as_text = self._began_as_text or bool(text.strip())
            told = len(text) - self._may_begin(text)
            self._held = text[told:]
            return self._tell(text[:told])
        self._held, self._finder = "", CallFinder(self._format)
        return [*self._tell(text[:begin]), *map(self._call_delta, self._finder.add(text[begin:]))]

    def finish(self) -> list[TextDelta | ToolCallDelta]:
        """What was held back, once no more comes."""
        if self.called:
            return []
        return self._tell(self._held if self._finder is None else self._finder.text)

    def _tell(self, text: str) -> list[TextDelta | ToolCallDelta]:
        self.sent += len(text)
        return [TextDelta(text)] if text else []

    def _call_delta(self, part: CallPart) -> ToolCallDelta:
        if part.name is None:
            return ToolCallDelta(self._calls - 1, None, None, part.arguments)
        self._calls += 1
        return ToolCallDelta(self._calls - 1, _new_id(), part.name, part.arguments)

    def _begin(self, text: str) -> int | None:
        """Where calls begin in text that was not told yet; None if there are none, or none yet."""
        if self._format is None:
            return None
        if self._format.marker:
            at = text.find(self._format.marker)
            return at if at >= 0 else None
        # Nothing but JSON tells calls from text: the answer has to start with it.
        start = len(text) - len(text.lstrip())
        return start if text[start : start + 1] in ("{", "[") else None

    def _may_begin(self, text: str) -> int:
        """Characters at the end of the text that may be the beginning of a marker."""
        marker = self._format.marker if self._format is not None else ""
        return max((n for n in range(1, len(marker)) if text.endswith(marker[:n])), default=0)


def _new_id() -> str:
    return uuid.uuid4().hex[:9]
