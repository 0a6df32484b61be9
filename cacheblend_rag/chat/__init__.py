"""Chat with any engine, by the model's own template: OpenAI's messages and tools in, text and tool calls out."""

from cacheblend_rag.chat.prompt import ChatPrompt, prepare_chat
from cacheblend_rag.chat.tool_format import ToolFormat
from cacheblend_rag.chat.tool_parser import ChatReply, TextDelta, ToolCall, ToolCallDelta, ToolParser

__all__ = [
    "ChatPrompt",
    "ChatReply",
    "TextDelta",
    "ToolCall",
    "ToolCallDelta",
    "ToolFormat",
    "ToolParser",
    "prepare_chat",
]
