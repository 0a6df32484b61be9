"""The format of tool calls is found in any template that writes a name and JSON."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cacheblend_rag import ConfigError
from cacheblend_rag.chat.tool_format import find_tool_format
from cacheblend_rag.engines.model_files import load_tokenizer, render_chat

from .families import HERMES, Model, Templated, chatml


def test_calls_in_elements_of_their_own(models: dict[str, Model]) -> None:
    for name in ("hermes", "thinking"):
        found = models[name].tool_format
        assert (found.opening, found.separator, found.closing) == ("", "\n", "")
        assert found.before_name == '<tool_call>\n{"name": "'
        assert found.before_arguments == '", "arguments": '
        assert (found.after_arguments, found.after_id) == ("}\n</tool_call>", None)
        assert (found.marker, found.call_marker) == ("<tool_call>", "<tool_call>")
        assert found.in_json and not found.single


def test_a_single_call_that_nothing_marks(models: dict[str, Model]) -> None:
    found = models["llama"].tool_format
    assert (found.before_name, found.before_arguments) == ('{"name": "', '", "parameters": ')
    assert (found.opening, found.after_arguments, found.closing) == ("", "}", "")
    assert (found.marker, found.call_marker) == ("", "")
    assert found.in_json and found.single


def test_a_list_of_calls_with_identifiers(models: dict[str, Model]) -> None:
    found = models["mistral"].tool_format
    assert (found.opening, found.separator, found.closing) == ("[TOOL_CALLS] [", ", ", "]")
    assert (found.before_name, found.before_arguments) == ('{"name": "', '", "arguments": ')
    assert (found.after_arguments, found.after_id) == (', "id": "', '"}')
    assert (found.marker, found.call_marker) == ("[TOOL_CALLS]", "")
    assert found.in_json and not found.single


def test_names_outside_of_the_json(models: dict[str, Model]) -> None:
    found = models["deepseek"].tool_format
    assert (found.opening, found.separator, found.closing) == ("<｜tool▁calls▁begin｜>", "\n", "<｜tool▁calls▁end｜>")
    assert found.before_name == "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    assert (found.before_arguments, found.after_arguments) == ("\n```json\n", "\n```<｜tool▁call▁end｜>")
    assert (found.marker, found.call_marker) == (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    )
    assert not found.in_json and not found.single
    found = models["mistral_v11"].tool_format
    assert (found.before_name, found.before_arguments, found.after_arguments) == ("[TOOL_CALLS]", "[ARGS]", "")
    assert found.marker == found.call_marker == "[TOOL_CALLS]"
    assert not found.in_json


def test_an_element_around_all_calls(models: dict[str, Model]) -> None:
    found = models["wrapped"].tool_format
    assert (found.opening, found.before_name, found.after_arguments) == ("<tool_calls>", '\n{"name": "', "}")
    assert (found.marker, found.call_marker, found.closing) == ("<tool_calls>", "", "\n</tool_calls>")
    found = models["nested"].tool_format
    assert (found.opening, found.before_name, found.after_arguments) == (
        "<calls>",
        '\n<call>{"name": "',
        "}</call>",
    )
    assert (found.marker, found.call_marker, found.closing) == ("<calls>", "<call>", "\n</calls>")


def test_a_turn_of_calls_that_ends_in_other_space(tokenizer: PreTrainedTokenizerFast) -> None:
    odd = HERMES.replace(
        "{{ '<|im_end|>\n' }}{% endfor %}", "{{ '<|im_end|>' }}{% if m.tool_calls %}{{ '\n' }}{% endif %}{% endfor %}"
    )
    assert odd != HERMES
    assert find_tool_format(Templated(tokenizer, odd), "some").after_arguments == "}\n</tool_call>"


def test_a_template_that_drops_all_calls_but_the_first(tokenizer: PreTrainedTokenizerFast) -> None:
    one = HERMES.replace("m.tool_calls %}{% if not", "m.tool_calls[:1] %}{% if not")
    assert one != HERMES
    assert find_tool_format(Templated(tokenizer, one), "some").single


XML = chatml(
    "{{ '<function=' + call.name + '>' }}{% for name, value in call.arguments.items() %}"
    "{{ '<parameter=' + name + '>' + value + '</parameter>' }}{% endfor %}{{ '</function>' }}"
)
PYTHONIC = chatml(
    "{{ call.name + '(' }}{% for name, value in call.arguments.items() %}{{ name }}={{ value | tojson }}{% endfor %})",
    before="[",
    after="]",
    between=", ",
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            "it does not show tools to the model",
        ),
        (chatml(""), "its tool calls are not a name and JSON arguments"),
        (XML, "its tool calls are not a name and JSON arguments"),
        (PYTHONIC, "its tool calls are not a name and JSON arguments"),
        (
            chatml("{{ '<c>' + call.name + (call.arguments | tojson | tojson) + '</c>' }}"),
            "its tool calls are not a name and JSON arguments",
        ),
        (chatml("{{ call.name + (call.arguments | tojson) }}"), "nothing tells its tool calls from text"),
        (
            chatml("{{ '<c>' + call.name + ':' + c.id + (call.arguments | tojson) + '</c>' }}"),
            "its tool calls have an identifier before their arguments",
        ),
        ("{{ raise_exception('No tools here.') }}", "No tools here."),
        (
            HERMES.replace("{% for m", "{% if messages[1] %}{{ raise_exception('One turn.') }}{% endif %}{% for m"),
            "One turn.",
        ),
        ("{{ messages[0].content.parts[0].text }}", "has no attribute 'parts'"),
        ("{% if %}", "Expected an expression"),
    ],
    ids=["no tools", "no calls", "xml", "pythonic", "string", "no marker", "id", "refuses", "turns", "other", "broken"],
)
def test_what_can_not_be_read_is_one_clear_error(
    tokenizer: PreTrainedTokenizerFast, template: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as error:
        find_tool_format(Templated(tokenizer, template), "mine")
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).startswith("the chat template of 'mine' can't be used with tools: ")
    assert str(error.value).endswith("Give chat_template=<one with tools>")


def test_a_model_without_a_template(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        render_chat(byte_tokenizer, "mine", [{"role": "user", "content": "?"}], None, True, {})


def test_the_template_of_a_real_model() -> None:
    directory = os.environ.get("CACHEBLEND_TEST_TOOL_MODEL")
    if not directory:
        pytest.skip("CACHEBLEND_TEST_TOOL_MODEL names no directory of a model of the Qwen 2.5 family")
    tokenizer = load_tokenizer(directory, Path(directory))
    found = find_tool_format(Templated(tokenizer, str(tokenizer.chat_template)), "qwen")
    assert found == find_tool_format(Templated(tokenizer, HERMES), "hermes")
