"""Answers are read as vLLM's own parsers read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from cacheblend_rag.chat import ToolParser

from .families import Model

Read = Callable[[str], tuple[str, list[tuple[str, Any]]]]

WEATHER = {"city": 'Köln "am" \\ {Rhein}', "days": [1, {"a": None}]}
CALLS = [[("get_weather", WEATHER)], [("stop", {})], [("get_weather", WEATHER), ("stop", {}), ("stop", {"now": True})]]


@pytest.fixture(scope="module")
def read_by_vllm(smollm2: str) -> dict[str, Read]:
    """vLLM's parsers, by family: content and calls."""
    pytest.importorskip("vllm", reason="vLLM is not installed: run `make vllm`")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    markers = ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"]
    tokenizer.add_tokens([*markers, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"], special_tokens=True)
    request = ChatCompletionRequest(model="some", messages=[{"role": "user", "content": "?"}])
    names = {"hermes": "hermes", "llama": "llama3_json", "mistral_v11": "mistral", "deepseek": "deepseek_v3"}

    def reader(name: str) -> Read:
        make = ToolParserManager.get_tool_parser(name)

        def read(text: str) -> tuple[str, list[tuple[str, Any]]]:
            found = make(tokenizer).extract_tool_calls(text, request)
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
            return found.content or "", calls

        return read

    return {family: reader(name) for family, name in names.items()}


def read(model: Model, text: str) -> tuple[str, list[tuple[str, Any]]]:
    reply = ToolParser(model.tool_format).parse(text)
    return reply.content, [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]


@pytest.mark.parametrize("family", ["hermes", "llama", "mistral_v11", "deepseek"])
@pytest.mark.parametrize("calls", CALLS, ids=["one", "no arguments", "several"])
def test_what_the_template_writes(
    models: dict[str, Model], read_by_vllm: dict[str, Read], family: str, calls: list[tuple[str, Any]]
) -> None:
    model = models[family]
    text = "; ".join(model.write([call]) for call in calls) if family == "llama" else model.write(calls)
    assert read(model, text) == read_by_vllm[family](text) == ("", calls)
    if family != "llama":  # vLLM's takes calls in the middle of text too, and drops the text
        assert read(model, "I see.\n" + text)[1] == read_by_vllm[family]("I see.\n" + text)[1] == calls
        assert read(model, "I see.\n" + text)[0].strip() == read_by_vllm[family]("I see.\n" + text)[0].strip()
    for other in ("", "I see.", "3 < 4 {", "<tool_call", "[TOOL"):
        assert read(model, other) == read_by_vllm[family](other) == (other, [])


HERMES = [
    'Well. <tool_call>{"name": "f", "arguments": {"a": [1, 2]}}</tool_call> So.',
    '<tool_call>{"arguments": {"a": {}}, "name": "f"}</tool_call>',
    '<tool_call>\n\n{"name" : "f" ,\n "arguments" : { }\n}\n</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}}',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call> and <tool_call>{"name": "g", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "g", "argu',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_c',
    '<tool_call>{"name": "f", "arguments": {"a": 1',
    '<tool_call>{"name": "f", "arguments": {"a": 1}',
    '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>',
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>f {"name": "f", "arguments": {}}</tool_call>',
    '<tool_call>"f"</tool_call>',
    "<tool_call></tool_call>",
    "<tool_call>",
    "Calls stand in <tool_call> and </tool_call>.",
    '</tool_call>{"name": "f", "arguments": {}}',
]


@pytest.mark.parametrize("text", HERMES)
def test_hermes(models: dict[str, Model], read_by_vllm: dict[str, Read], text: str) -> None:
    assert read(models["hermes"], text) == read_by_vllm["hermes"](text)


LLAMA = [
    '{"name": "f", "arguments": {"a": [1, 2]}}',
    '{"parameters": {"a": {}}, "name": "f"}',
    '\n{"name" : "f" ,\n "parameters" : { }\n}\n',
    '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
    '{"name": "f", "parameters": {}} {"name": "g", "parameters": {}} Done.',
    '{"name": "f", "parameters": {}}; {"name": "g", "para',
    '{"name": "f", "parameters": {"a": 1',
    '{"name": "f", "parameters": {"a": 1}',
    '{"name": "f", "parameters": {"a": }}',
    '{"name": "f"}',
    '{"parameters": {}}',
    '{"answer": "f"}',
    "{'name': 'f'}",
    "{",
    "f(1)",
]


@pytest.mark.parametrize("text", LLAMA)
def test_llama(models: dict[str, Model], read_by_vllm: dict[str, Read], text: str) -> None:
    ours, theirs = read(models["llama"], text), read_by_vllm["llama"](text)
    assert ours[1] == theirs[1]
    assert ours[0].strip() == theirs[0].strip()
