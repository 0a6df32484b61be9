"""What a template writes is read back, at once and in pieces."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheblend_rag.chat import ChatReply, TextDelta, ToolCallDelta, ToolParser, finding

from .families import FAMILIES, Model

QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        '"',
        "\\",
        "}",
        "{",
        '"}',
        '\\"}',
        "]",
        "</tool_call>",
        "<tool_call>",
        "```",
        "[TOOL_CALLS] [",
        "日本\n",
        "\\u00e9",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,16}", fullmatch=True)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(ANY_TEXT, VALUES, max_size=4)), min_size=1, max_size=3)
TALK = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="{["), max_size=20)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    """Each family in turn."""
    return models[request.param]


def calls_of(reply: ChatReply) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]


def in_pieces(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


def streamed(parser: ToolParser, pieces: Sequence[str]) -> ChatReply:
    """The reply that the deltas add up to, as any client would add them up."""
    content, names, arguments, ids = "", list[str](), list[str](), list[str]()
    for delta in [*(delta for piece in pieces for delta in parser.add(piece)), *parser.finish()]:
        if isinstance(delta, TextDelta):
            assert not names, "no text comes after calls"
            assert delta.text
            content += delta.text
            continue
        assert isinstance(delta, ToolCallDelta)
        if delta.index == len(names):
            assert delta.name and delta.id and len(delta.id) == 9
            names.append(delta.name)
            ids.append(delta.id)
            arguments.append("")
        else:
            assert delta.name is None and delta.id is None and delta.arguments
            assert delta.index == len(names) - 1, "calls come one after the other"
        arguments[delta.index] += delta.arguments
    assert parser.called == bool(names)
    assert len(set(ids)) == len(ids)
    reply = parser.parse("".join(pieces))
    assert [call.arguments for call in reply.tool_calls] == arguments
    assert [call.name for call in reply.tool_calls] == names
    assert reply.content == content
    return reply


@QUICK
@given(calls=CALLS, talk=TALK, cuts=st.lists(st.integers(0, 10**4), max_size=30))
def test_calls_are_read_back(model: Model, calls: list[tuple[str, Any]], talk: str, cuts: list[int]) -> None:
    if model.tool_format.single:
        calls = calls[:1]
    if not model.tool_format.marker:
        talk = ""
    text = talk + model.write(calls)
    reply = ToolParser(model.tool_format).parse(text)
    assert calls_of(reply) == calls
    assert reply.content == talk
    assert {len(call.id) for call in reply.tool_calls} == {9}
    assert calls_of(streamed(ToolParser(model.tool_format), in_pieces(text, cuts))) == calls


@QUICK
@given(calls=CALLS, at=st.integers(0, 10**4))
def test_what_is_cut_off_is_text_or_what_was_complete(model: Model, calls: list[tuple[str, Any]], at: int) -> None:
    if model.tool_format.single:
        calls = calls[:1]
    whole = model.write(calls)
    text = whole[: at % len(whole)]
    reply = ToolParser(model.tool_format).parse(text)
    found = calls_of(reply)
    assert found == calls[: len(found)]
    assert reply.content == ("" if found else text)


@QUICK
@given(
    text=st.text(max_size=60) | st.text('<tool_cal>{}[]"\\:, name\n', max_size=60), cuts=st.lists(st.integers(0, 99))
)
def test_anything_else_is_text(models: dict[str, Model], text: str, cuts: list[int]) -> None:
    for model in models.values():
        assert streamed(ToolParser(model.tool_format), in_pieces(text, cuts)) == ChatReply(text)
    assert streamed(ToolParser(None), in_pieces(text, cuts)) == ChatReply(text)


def test_text_comes_as_soon_as_it_is_certain(models: dict[str, Model]) -> None:
    parser = ToolParser(models["hermes"].tool_format)
    told = [
        parser.add(piece) for piece in ("So", " 1 <", " 2 <tool", "_c", "ustom> <tool_call", ">\n", '{"name": "f", ')
    ]
    texts = ["".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) for deltas in told]
    assert texts == ["So", " 1 ", "< 2 ", "", "<tool_custom> ", "", ""]
    (begun,) = parser.add('"arguments": {"a": "x')
    assert begun == ToolCallDelta(0, begun.id, "f", '{"a": "x')  # type: ignore[union-attr]
    assert parser.add("y") == [ToolCallDelta(0, None, None, "y")]
    assert parser.add('"}') == [ToolCallDelta(0, None, None, '"}')]
    assert parser.add("}\n</tool_call>") == parser.finish() == []


def test_a_marker_that_never_comes_is_told_at_the_end(models: dict[str, Model]) -> None:
    parser = ToolParser(models["hermes"].tool_format)
    assert parser.add("Write <tool_") == [TextDelta("Write ")]
    assert parser.finish() == [TextDelta("<tool_")]
    assert not parser.called


HERMES_TEXTS = {
    "name last": ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", {"a": 1})]),
    "parameters": ('<tool_call>{"name": "f", "parameters": {}}</tool_call>', [("f", {})]),
    "no end": ('<tool_call>{"name": "f", "arguments": {}}', [("f", {})]),
    "arguments as text": ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
    "a list": (
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>',
        [("f", {}), ("g", {})],
    ),
    "text between and after": (
        '<tool_call>{"name": "f", "arguments": {}}</tool_call> and {"name": "h", "arguments": {}} '
        '<tool_call>{"name": "g", "arguments": {}}</tool_call> {"name": "h", "arguments": {}}',
        [("f", {}), ("g", {})],
    ),
    "an escaped name": ('<tool_call>{"name": "f\\u0067", "arguments": {}}</tool_call>', [("fg", {})]),
    "text first": ('<tool_call> f {"name": "f", "arguments": {}}</tool_call>', []),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', []),
    "name of another kind": ('<tool_call>{"arguments": {}, "name": 1}</tool_call>', []),
    "arguments of another kind": ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', []),
    "not a call": ("<tool_call>[1, 2]</tool_call>", []),
    "a second one cut off": ('<tool_call>{"arguments": {}, "name": "f"}</tool_call><tool_call>', []),
    "mentioned": ("Calls stand in <tool_call> elements.", []),
    "too deep": ('<tool_call>{"arguments": ' + '{"a": ' * 5000 + "1" + "}" * 5000 + ', "name": "f"}', []),
}


@pytest.mark.parametrize("text", HERMES_TEXTS)
def test_what_models_write_besides(models: dict[str, Model], text: str) -> None:
    written, calls = HERMES_TEXTS[text]
    reply = ToolParser(models["hermes"].tool_format).parse(written)
    assert calls_of(reply) == calls
    assert reply.content == ("" if calls else written)
    if text != "a second one cut off":  # of which the first was told before
        pieces = in_pieces(written, range(0, len(written), 1 + len(written) // 100))
        assert calls_of(streamed(ToolParser(models["hermes"].tool_format), pieces)) == calls


class Counting:
    """A regular expression that counts the characters it looks at."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.looked_at = 0
        self._pattern = pattern

    def search(self, text: str, at: int) -> re.Match[str] | None:
        found = self._pattern.search(text, at)
        self.looked_at += (len(text) if found is None else found.end()) - at
        return found


@pytest.mark.parametrize("value", ["many words, ", "{[", '\\"\\\\'])
def test_a_long_call_is_not_read_again_with_each_piece(
    model: Model, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, inside = Counting(finding._OUTSIDE), Counting(finding._IN_STRING)
    monkeypatch.setattr(finding, "_OUTSIDE", outside)
    monkeypatch.setattr(finding, "_IN_STRING", inside)
    arguments = {"text": value * 500, "list": [[1, 2, {"a": "b"}]] * 50}
    text = model.write([("f", arguments)])
    parser = ToolParser(model.tool_format)
    told = [delta for piece in text for delta in parser.add(piece)]
    assert json.loads("".join(delta.arguments for delta in told if isinstance(delta, ToolCallDelta))) == arguments
    assert outside.looked_at + inside.looked_at < 4 * len(text)  # for arguments, object and list


def test_a_marker_is_not_looked_for_again_in_what_was_told(models: dict[str, Model]) -> None:
    parser = ToolParser(models["hermes"].tool_format)
    for _ in range(1000):
        assert parser.add("<tool> ") == [TextDelta("<tool> ")]
    assert not parser._held


def test_arguments_that_break_later_were_told_and_are_text_in_the_whole(models: dict[str, Model]) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'
    parser = ToolParser(models["hermes"].tool_format)
    (delta,) = parser.add(text)
    assert isinstance(delta, ToolCallDelta) and delta.arguments == '{"a": }'
    assert parser.finish() == []
    assert parser.parse(text) == ChatReply(text)


def test_a_whole_list_is_needed(models: dict[str, Model]) -> None:
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}'
    parser = ToolParser(models["mistral"].tool_format)
    assert parser.parse(text) == ChatReply(text)
    assert [call.name for call in parser.parse(text + "]").tool_calls] == ["f"]
    assert [call.name for call in parser.parse(text + "] [TOOL_CALLS] " + text[13:] + "]").tool_calls] == ["f", "f"]


def test_only_an_answer_that_begins_with_json_has_calls_that_nothing_marks(models: dict[str, Model]) -> None:
    parser = ToolParser(models["llama"].tool_format)
    call = '{"name": "f", "parameters": {}}'
    assert parser.parse(f"I call {call}") == ChatReply(f"I call {call}")
    assert [found.name for found in parser.parse(f"\n{call}; {call}").tool_calls] == ["f", "f"]
    assert parser.parse('{"answer": 1}') == ChatReply('{"answer": 1}')
