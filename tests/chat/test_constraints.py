"""What xgrammar lets a model write under the constraints that are made of tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cacheblend_rag import ConfigError
from cacheblend_rag.chat import ToolParser
from cacheblend_rag.structured import either, structural_tag

from .families import FAMILIES, Model, tool

xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed: run `make test`")

WEATHER = tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["C", "F"]},
            "place": {"$ref": "#/$defs/place"},
        },
        "required": ["city"],
        "$defs": {
            "place": {
                "type": "object",
                "properties": {"tags": {"type": "array", "items": {"type": "string"}}, "height": {"type": "integer"}},
                "required": ["tags", "height"],
            }
        },
    },
)
STOP = tool("stop", {"type": "object", "properties": {}})
NOTHING = {"type": "function", "function": {"name": "wait"}}
TOOLS = [WEATHER, STOP, NOTHING]
PLACE = {"city": 'Bad "Ems"\n日', "unit": "C", "place": {"tags": ["a", "b"], "height": 3}}

Accepts = Callable[[str | None, str], bool]


@pytest.fixture(scope="session")
def accepts(tokenizer: PreTrainedTokenizerFast) -> Accepts:
    """Whether an answer fits a constraint, its end included."""
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[tokenizer.eos_token_id])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)

    def accepts(tag: str | None, text: str) -> bool:
        assert tag is not None
        matcher = xgrammar.GrammarMatcher(compiler.compile_structural_tag(tag))
        return bool(matcher.accept_string(text) and matcher.accept_token(tokenizer.eos_token_id))

    return accepts


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    """Each family in turn."""
    return models[request.param]


def test_required_is_calls_and_nothing_else(model: Model, accepts: Accepts) -> None:
    tag = model.tool_format.constraint(TOOLS, required=True, parallel=True)
    one, none, missing = (model.write([call]) for call in (("get_weather", PLACE), ("stop", {}), ("wait", {})))
    assert all(accepts(tag, text) for text in (one, none, missing))
    for bad in ("", "Hello", "Hello " + one, one + " Bye", one[:-1], one.replace("get_weather", "get_wether")):
        assert not accepts(tag, bad)
    for arguments in (
        {},
        {"city": 1},
        {"city": "x", "unit": "K"},
        {"city": "x", "more": 1},
        {"city": "x", "place": {}},
    ):
        assert not accepts(tag, model.write([("get_weather", arguments)]))
    assert not accepts(tag, model.write([("stop", {"now": True})]))


def test_several_calls(model: Model, accepts: Accepts) -> None:
    if model.tool_format.single:
        pytest.skip("its template has one call at a time")
    two = model.write([("stop", {}), ("get_weather", {"city": "x"})])
    for required in (True, False):
        assert accepts(model.tool_format.constraint(TOOLS, required=required, parallel=True), two)
        assert not accepts(model.tool_format.constraint(TOOLS, required=required, parallel=False), two)


def test_auto_is_text_with_or_without_calls(model: Model, accepts: Accepts) -> None:
    tag = model.tool_format.constraint(TOOLS, required=False, parallel=True)
    if not model.tool_format.marker:
        assert tag is None  # a call can't be told from text before it is complete
        return
    one = model.write([("get_weather", PLACE)])
    for text in ("", "Hello {x} <b> [T", one, "Hello\n" + one):
        assert accepts(tag, text)
    for text in (model.tool_format.marker + "?", one[:-4], model.write([("get_weather", {})])):
        assert not accepts(tag, text)
    alone = model.tool_format.constraint(TOOLS, required=False, parallel=False)
    assert accepts(alone, "Hello " + one)
    assert not accepts(alone, one + one)


def test_one_tool_by_its_name(model: Model, accepts: Accepts) -> None:
    tag = model.tool_format.constraint([STOP], required=True, parallel=False)
    assert accepts(tag, model.write([("stop", {})]))
    assert not accepts(tag, model.write([("get_weather", PLACE)]))


def test_what_is_let_through_is_read(models: dict[str, Model], accepts: Accepts) -> None:
    """The constraint's own spacing and identifiers."""
    for name, text in {
        "hermes": '<tool_call>\n{"name": "stop", "arguments": {  }}\n</tool_call>',
        "mistral": '[TOOL_CALLS] [{"name": "stop", "arguments": {}, "id": "aZ3456789"}]',
        "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n```json\n{\n}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    }.items():
        found = models[name].tool_format
        assert accepts(found.constraint(TOOLS, required=True, parallel=True), text)
        assert [call.name for call in ToolParser(found).parse(text).tool_calls] == ["stop"]
    tag = models["mistral"].tool_format.constraint(TOOLS, required=True, parallel=True)
    assert not accepts(tag, '[TOOL_CALLS] [{"name": "stop", "arguments": {}, "id": "short"}]')


def test_space_in_json_has_an_end(accepts: Accepts) -> None:
    tag = structural_tag({"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}})
    assert accepts(tag, '{"a": 1}')
    assert accepts(tag, '{ \n"a" : 1\n\n}')
    assert not accepts(tag, '{"a":    1}')


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"json": '{"type": "integer"}'}, ["12"], ["x", "1.5", ""]),
        ({"json": True}, ["12", '{"a": [null]}'], ["x", ""]),
        ({"regex": r"[a-c]{2}\d+"}, ["ab1", "cc42"], ["a1", "ab", ""]),
        ({"choice": ["yes", "no", 'a "b" \\ ü']}, ["yes", 'a "b" \\ ü'], ["maybe", "yesno", "ye", ""]),
        ({"choice": ("a", "ab")}, ["a", "ab"], ["abb"]),
        ({"grammar": 'root ::= "(" root ")" | "x"'}, ["x", "((x))"], ["(x", ""]),
        ({"structural_tag": structural_tag({"choice": ["yes"]})}, ["yes"], ["no"]),
        ({"structural_tag": json.loads(structural_tag({"choice": ["yes"]}))}, ["yes"], ["no"]),
        (
            {"structural_tag": either(structural_tag({"choice": ["yes"]}), structural_tag({"json": True}))},
            ["yes", "[]"],
            ["no", "yes[]"],
        ),
    ],
    ids=str,
)
def test_every_kind_of_constraint(
    accepts: Accepts, constraint: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    tag = structural_tag(constraint)
    assert all(accepts(tag, text) for text in good)
    assert not any(accepts(tag, text) for text in bad)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({}, "one entry of json, regex"),
        ({"json": {}, "regex": "a"}, "one entry of json, regex"),
        ({"yaml": {}}, "one entry of json, regex"),
        ("json", "one entry of json, regex"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": "[" * 100_000}, "json is no JSON"),
        ({"json": 3}, "json must be a dict, not 3"),
        ({"json": False}, "json must be a dict, not False"),
        ({"json": {"enum": {1, 2}}}, "json can't be written as JSON"),
        ({"regex": ""}, "regex must be non-empty text"),
        ({"grammar": None}, "grammar must be non-empty text"),
        ({"choice": []}, "choice must be a list of non-empty strings"),
        ({"choice": "yes"}, "choice must be a list of non-empty strings"),
        ({"choice": ["yes", ""]}, "choice must be a list of non-empty strings"),
        ({"structural_tag": True}, "structural_tag must be a dict"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_constraints_are_one_clear_line(constraint: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        structural_tag(constraint)
    assert len(str(error.value).splitlines()) == 1


def test_a_schema_too_deep_for_python() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ConfigError, match="json can't be written as JSON"):
        structural_tag({"json": schema})
