"""Short chat templates that write tool calls as the families of models do."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from cacheblend_rag.chat.tool_format import ToolFormat, find_tool_format
from cacheblend_rag.engines.model_files import render_chat

_TOOLS = "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}"
_TOOLS += "{{ '<|im_end|>\n' }}{% endif %}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def chatml(call: str, *, before: str = "", after: str = "", between: str = "", thoughts: str = "") -> str:
    """A template of ChatML.

    Args:
        call: Writes the name and the arguments of ``call``.
        before: Text before all calls.
        after: Text after all calls.
        between: Text between two calls.
        thoughts: What each turn of the model begins with.
    """
    loop = "{% for c in m.tool_calls %}{% if not loop.first %}{{ between }}{% endif %}{% set call = c.function %}"
    return (
        f"{{% set between = {between!r} %}}{_TOOLS}{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' }}}}"
        f"{{% if m.role == 'assistant' %}}{{{{ {thoughts!r} }}}}{{% endif %}}{{{{ m.content }}}}"
        f"{{% if m.tool_calls %}}{{{{ {before!r} }}}}{loop}{call}{{% endfor %}}{{{{ {after!r} }}}}{{% endif %}}"
        f"{{{{ '<|im_end|>\n' }}}}{{% endfor %}}{_OPEN}"
    )


_NAME_IN_JSON = """{{ '{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}' }}"""

HERMES = chatml("{{ '<tool_call>\n' }}" + _NAME_IN_JSON + "{{ '\n</tool_call>' }}", between="\n")

# One line of JSON a call, all of them in one element.
WRAPPED = chatml(_NAME_IN_JSON + "{{ '\n' }}", before="<tool_calls>\n", after="</tool_calls>")

# An element a call, all of them in another.
NESTED = chatml(
    "{{ '<call>' }}" + _NAME_IN_JSON + "{{ '</call>' }}", before="<calls>\n", after="\n</calls>", between="\n"
)

THINKING = chatml(
    "{{ '<tool_call>\n' }}" + _NAME_IN_JSON + "{{ '\n</tool_call>' }}",
    between="\n",
    thoughts="<think>\n\n</think>\n\n",
).replace("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}")

LLAMA = """{{ '<|begin_of_text|>' }}{% for m in messages %}
{% if m.tool_calls %}
{% if m.tool_calls | length > 1 %}{{ raise_exception('One call at a time!') }}{% endif %}
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
{% else %}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}{% endif %}
{{ m.content + '<|eot_id|>' }}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""".replace(
    "}\n{", "}{"
)

MISTRAL = """{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}
{% if loop.last or loop.index0 == messages | length - 2 %}
{% if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}{% endif %}
{{ '[INST] ' + m.content + '[/INST]' }}
{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}
{% for c in m.tool_calls %}
{% if c.id | length != 9 %}{{ raise_exception('Identifiers have length 9!') }}{% endif %}
{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson + ', "id": "' + c.id + '"}' }}
{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ']</s>' }}
{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}""".replace("}\n{", "}{")

# Later ones write the name first.
MISTRAL_V11 = """{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}
{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{ '[INST]' + m.content + '[/INST]' }}
{% elif m.tool_calls %}{% for c in m.tool_calls %}
{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}{{ '</s>' }}
{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}""".replace("}\n{", "}{")

DEEPSEEK = """{{ '<｜begin▁of▁sentence｜>' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{% elif m.tool_calls %}{{ '<｜Assistant｜>' + m.content + '<｜tool▁calls▁begin｜>' }}{% for c in m.tool_calls %}
{% if not loop.first %}{{ '\n' }}{% endif %}
{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\n```json\n' }}
{{ c.function.arguments | tojson + '\n```<｜tool▁call▁end｜>' }}{% endfor %}
{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{% else %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}""".replace("}\n{", "}{")


@dataclasses.dataclass(frozen=True)
class Family:
    """A template and what is around a turn of the model in it."""

    template: str
    turn_begin: str = "<|im_start|>assistant\n"
    turn_end: str = "<|im_end|>\n"


FAMILIES = {
    "hermes": Family(HERMES),
    "wrapped": Family(WRAPPED),
    "nested": Family(NESTED),
    "thinking": Family(THINKING, "</think>\n\n"),
    "llama": Family(LLAMA, "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "mistral": Family(MISTRAL, "[/INST]", "</s>"),
    "mistral_v11": Family(MISTRAL_V11, "[/INST]", "</s>"),
    "deepseek": Family(DEEPSEEK, "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
}


class Templated:
    """Renders messages by one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer.chat_template = template

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        return render_chat(self._tokenizer, "some", messages, tools, add_generation_prompt, {})


@dataclasses.dataclass(frozen=True)
class Model:
    """A family's template, rendered, and the format that was found in it."""

    family: Family
    render: Templated
    tool_format: ToolFormat

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """What the model would write to make some calls (names and arguments)."""
        written = [
            {"id": f"call{n:05}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for n, (name, arguments) in enumerate(calls)
        ]
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": written}]
        past = self.render(messages, tools=[tool(name) for name, _ in calls], add_generation_prompt=False)
        _, _, turn = past.partition(self.family.turn_begin)
        assert turn.endswith(self.family.turn_end)
        return turn.removesuffix(self.family.turn_end)


def open_model(tokenizer: PreTrainedTokenizerFast, name: str) -> Model:
    """The model of a family."""
    render = Templated(tokenizer, FAMILIES[name].template)
    return Model(FAMILIES[name], render, find_tool_format(render, name))


def tool(name: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A tool in OpenAI's format; by default it takes anything."""
    schema = {"type": "object"} if parameters is None else dict(parameters)
    return {"type": "function", "function": {"name": name, "description": "a tool", "parameters": schema}}
