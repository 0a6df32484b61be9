"""Messages and tools become a prompt, a constraint and a parser."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cacheblend_rag import ConfigError, Engine, load_engine
from cacheblend_rag.chat import ChatReply, ToolFormat, prepare_chat

from .families import FAMILIES, HERMES, LLAMA, tool

QUESTION = [{"role": "user", "content": "How warm is it?"}]
TOOLS = [tool("get_weather"), tool("stop")]
SCHEMA = {"json": {"type": "object"}}


@pytest.fixture(scope="module")
def open_engine(make_model: Callable[..., str]) -> Iterator[Callable[[str], Engine]]:
    """A small random model with some chat template."""
    directory = make_model("llama", model_type="llama")
    engines: dict[str, Engine] = {}

    def get(template: str) -> Engine:
        if template not in engines:
            engines[template] = load_engine(directory, chat_template=template, dtype="float32", device="cpu")
        return engines[template]

    yield get
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def engine(open_engine: Callable[[str], Engine]) -> Engine:
    """With Hermes' template."""
    return open_engine(HERMES)


def tag_of(sampling: Any) -> Any:
    return json.loads(sampling["structured_outputs"]["structural_tag"])


def constraint(found: ToolFormat, tools: list[dict[str, Any]], **how: bool) -> Any:
    tag = found.constraint(tools, **how)  # type: ignore[arg-type]
    assert tag is not None
    return json.loads(tag)


def test_without_tools_it_is_the_template(engine: Engine) -> None:
    for tools in (None, []):
        chat = prepare_chat(engine, QUESTION, tools=tools)
        assert chat.prompt == engine.render_chat(QUESTION)
        assert (dict(chat.sampling), chat.tool_format) == ({}, None)
        assert chat.parse("<tool_call>{}</tool_call>") == ChatReply("<tool_call>{}</tool_call>")
    assert dict(prepare_chat(engine, QUESTION, structured_outputs=SCHEMA).sampling) == {"structured_outputs": SCHEMA}


@pytest.mark.parametrize(
    ("choice", "parallel", "tools", "how"),
    [
        ("auto", True, TOOLS, {"required": False, "parallel": True}),
        ("auto", False, TOOLS, {"required": False, "parallel": False}),
        ("required", True, TOOLS, {"required": True, "parallel": True}),
        ("required", False, TOOLS, {"required": True, "parallel": False}),
        ("stop", True, TOOLS[1:], {"required": True, "parallel": False}),
    ],
)
def test_choices_of_tools(
    engine: Engine, choice: str, parallel: bool, tools: list[dict[str, Any]], how: dict[str, bool]
) -> None:
    chat = prepare_chat(engine, QUESTION, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
    assert chat.prompt == engine.render_chat(QUESTION, tools=TOOLS)
    assert "get_weather" in chat.prompt
    assert chat.sampling["skip_special_tokens"] is False
    assert tag_of(chat.sampling) == constraint(engine.tool_format, tools, **how)
    reply = chat.parse('Yes.\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    assert reply.content == "Yes.\n"
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("stop", "{}")]


def test_none_shows_tools_and_calls_none(engine: Engine) -> None:
    chat = prepare_chat(engine, QUESTION, tools=TOOLS, tool_choice="none")
    assert chat.prompt == engine.render_chat(QUESTION, tools=TOOLS)
    assert (dict(chat.sampling), chat.tool_format) == ({}, None)


def test_calls_that_nothing_marks_are_not_constrained_unless_required(open_engine: Callable[[str], Engine]) -> None:
    engine = open_engine(LLAMA)
    assert dict(prepare_chat(engine, QUESTION, tools=TOOLS).sampling) == {"skip_special_tokens": False}
    assert "structured_outputs" in prepare_chat(engine, QUESTION, tools=TOOLS, tool_choice="required").sampling


def test_an_answer_of_some_form_or_calls(engine: Engine) -> None:
    chat = prepare_chat(engine, QUESTION, tools=TOOLS, structured_outputs={"choice": ["yes"]})
    yes, calls = tag_of(chat.sampling)["format"]["elements"]
    assert yes == {"type": "or", "elements": [{"type": "const_string", "value": "yes"}]}
    assert calls == constraint(engine.tool_format, TOOLS, required=True, parallel=True)["format"]
    assert chat.tool_format == engine.tool_format


@pytest.mark.parametrize("name", ["hermes", "thinking", "llama"])
def test_past_calls_and_results_are_shown(open_engine: Callable[[str], Engine], name: str) -> None:
    engine = open_engine(FAMILIES[name].template)
    calls = [{"id": "call00000", "type": "function", "function": {"name": "stop", "arguments": '{"at": "é"}'}}]
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call00000", "content": [{"type": "text", "text": "done"}]},
    ]
    prompt = prepare_chat(engine, messages, tools=TOOLS).prompt
    assert "done" in prompt
    assert '{"at": "é"}' in prompt
    assert "None" not in prompt


def test_contents_are_joined(engine: Engine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "thinking", "thinking": "hm"}, "two"]
    chat = prepare_chat(engine, [{"role": "user", "content": parts}])
    assert chat.prompt == engine.render_chat([{"role": "user", "content": "one\ntwo"}])
    assert parts == [{"type": "text", "text": "one"}, {"type": "thinking", "thinking": "hm"}, "two"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "x"}}], "'image_url' block"),
        ([{"text": "one"}], "None block"),
        ([{"type": "text"}], "'text' block"),
        ([1], "'text' block"),
        (1, "text or a list of text blocks, not 1"),
    ],
    ids=str,
)
def test_messages_that_are_no_text(engine: Engine, content: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare_chat(engine, [{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tools": TOOLS, "tool_choice": "look_up"}, "tool_choice is 'look_up', but the tools are get_weather, stop"),
        ({"tool_choice": "required"}, "tool_choice is 'required', but the tools are none"),
        ({"tools": TOOLS, "tool_choice": "required", "structured_outputs": SCHEMA}, "give one of them"),
        ({"tools": TOOLS, "tool_choice": "stop", "structured_outputs": SCHEMA}, "give one of them"),
        ({"tools": TOOLS, "structured_outputs": {"json": 1}}, "json must be a dict"),
        ({"tools": [{"name": "stop"}]}, "a tool must be"),
        ({"tools": [{"function": {"name": ""}}]}, "a tool must be"),
        ({"tools": ["stop"]}, "a tool must be"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments_are_one_clear_line(engine: Engine, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        prepare_chat(engine, QUESTION, **arguments)
    assert len(str(error.value).splitlines()) == 1


def test_a_template_without_tools(open_engine: Callable[[str], Engine]) -> None:
    engine = open_engine("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    assert prepare_chat(engine, QUESTION).prompt == "user: How warm is it?\n"
    with pytest.raises(ConfigError, match="it does not show tools to the model"):
        prepare_chat(engine, QUESTION, tools=TOOLS)
