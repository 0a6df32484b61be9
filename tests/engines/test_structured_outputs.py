"""Answers that must look like something, on SmolLM2 itself."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from cacheblend_rag import CacheBlendError, ConfigError, load_engine
from cacheblend_rag.engines.grammar import GrammarCompiler
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.structured import structural_tag

from .conftest import open_engine, random_text

pytest.importorskip("xgrammar", reason="xgrammar is not installed: run `make test`")

PASSAGE = (
    "The lighthouse on Gannow Isle was built in 1874 by the engineer Dorothea Flane. Its lamp burns whale oil no more, "
    "but the tower of grey stone still stands ninety steps above the harbour and is painted white every third spring."
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "year": {"type": "integer", "maximum": 2000}},
    "required": ["name", "year"],
}
SENTENCE = {"regex": r"[A-Z][a-z]{1,7}( [a-z]{1,7}){2}\."}
TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<year>", "content": {"type": "regex", "pattern": "[0-9]{4}"}, "end": "</year>"},
}
KINDS: list[tuple[dict[str, Any], str]] = [
    ({"json": SCHEMA}, r'\{\s*"name"\s*:\s*"[^\n]*"\s*,\s*"year"\s*:\s*-?\d+\s*\}'),
    (SENTENCE, SENTENCE["regex"]),
    ({"choice": ["eighteen seventy", "the year 1874"]}, "eighteen seventy|the year 1874"),
    ({"grammar": 'root ::= "In " year\nyear ::= "18" digit digit\ndigit ::= [0-9]'}, r"In 18\d\d"),
    ({"structural_tag": TAG}, r"<year>\d{4}</year>"),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """For so small a model more threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(smol: TransformersEngine) -> TransformersEngine:
    smol.warm([PASSAGE])
    return smol


@pytest.fixture(scope="module")
def prompt(engine: TransformersEngine) -> str:
    question = f"{PASSAGE}\n\nWhen was the lighthouse built?"
    return engine.render_chat([{"role": "user", "content": question}])


@pytest.mark.parametrize(
    ("constraint", "pattern"), KINDS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_every_kind(engine: TransformersEngine, prompt: str, constraint: dict[str, Any], pattern: str) -> None:
    free = engine.generate(prompt, max_tokens=4)
    assert not re.fullmatch(pattern, free.text)
    greedy = engine.generate(prompt, max_tokens=40, structured_outputs=constraint)
    assert re.fullmatch(pattern, greedy.text)
    assert greedy.finish_reason == "stop"
    assert greedy.token_ids[-1] in engine._eos
    assert (greedy.stats.decision, greedy.stats.segments) == ("blend", 1)
    assert greedy.stats.reused_tokens > 30
    settings: dict[str, Any] = {"max_tokens": 40, "temperature": 1.5, "seed": 3, "structured_outputs": constraint}
    *_, last = pieces = list(engine.stream(prompt, **settings))
    assert last.generation is not None
    assert re.fullmatch(pattern, last.generation.text)
    assert "".join(pieces) == last.generation.text
    assert engine.generate(prompt, max_tokens=4).token_ids == free.token_ids  # nothing is left of it


def test_json_is_of_its_schema(engine: TransformersEngine, prompt: str) -> None:
    for settings in ({}, {"temperature": 2.0, "seed": 2, "top_k": 200, "top_p": 0.99}):
        answers = [
            engine.generate(prompt, max_tokens=60, structured_outputs={"json": SCHEMA}, **settings) for _ in range(2)
        ]
        assert answers[0].token_ids == answers[1].token_ids
        answer = json.loads(answers[0].text)
        assert list(answer) == ["name", "year"]
        assert isinstance(answer["name"], str) and len(answer["name"]) <= 12
        assert isinstance(answer["year"], int) and answer["year"] <= 2000


def test_stop_strings_and_lengths_end_it_as_ever(engine: TransformersEngine, prompt: str) -> None:
    whole = engine.generate(prompt, max_tokens=40, structured_outputs={"json": SCHEMA})
    short = engine.generate(prompt, max_tokens=3, structured_outputs={"json": SCHEMA})
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:3], "length")
    stopped = engine.generate(prompt, max_tokens=40, structured_outputs={"json": SCHEMA}, stop='"year')
    assert (stopped.text, stopped.finish_reason) == (whole.text.partition('"year')[0], "stop")


def test_logprobs_are_over_what_is_left(engine: TransformersEngine, prompt: str) -> None:
    choice = {"choice": ["yes", "no"]}
    answer = engine.generate(prompt, max_tokens=8, structured_outputs=choice, logprobs=20)
    assert answer.text in ("yes", "no")
    assert answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids)
    for token, logprobs in zip(answer.token_ids, answer.logprobs, strict=True):
        assert token in logprobs
        assert all(math.isfinite(logprob) for logprob in logprobs.values())
        assert sum(map(math.exp, logprobs.values())) == pytest.approx(1, abs=1e-4)
    beginnings = {engine.decode([token]) for token in answer.logprobs[0]}
    assert beginnings <= {"y", "ye", "yes", "n", "no"}
    assert answer.logprobs[-1] == {answer.token_ids[-1]: 0.0}  # nothing but the end is left


def test_answers_side_by_side_do_not_meet(engine: TransformersEngine, prompt: str) -> None:
    kinds = [KINDS[0][0], SENTENCE, None]
    alone = [engine.generate(prompt, max_tokens=12, structured_outputs=kind).token_ids for kind in kinds]
    found: dict[int, list[int]] = {}
    start = threading.Barrier(len(kinds))

    def ask(number: int) -> None:
        start.wait()
        found[number] = engine.generate(prompt, max_tokens=12, structured_outputs=kinds[number]).token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(kinds))] == alone


def test_a_complete_answer_ends_even_where_the_end_is_ignored(engine: TransformersEngine, prompt: str) -> None:
    choice = {"choice": ["yes", "no"]}
    answer = engine.generate(prompt, max_tokens=12, structured_outputs=choice, ignore_eos=True)
    assert answer.text in ("yes", "no")
    assert answer.finish_reason == "stop"


BAD: list[tuple[Any, str]] = [
    ({"json": {"type": "nonsense"}}, 'Unsupported type "nonsense"'),
    ({"regex": "(["}, "Unclosed"),
    ({"regex": "a\0b"}, "null"),
    ({"grammar": "root ::= other"}, '"other" is not defined'),
    ({"structural_tag": {"type": "structural_tag", "format": {"type": "nonsense"}}}, "nonsense"),
    ({"structural_tag": {"format": 1}}, "structural"),
    ({"yaml": "x"}, "one entry of json"),
]


@pytest.mark.parametrize(("constraint", "words"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_constraint_is_told_before_the_prompt_is_read(
    engine: TransformersEngine, prompt: str, constraint: Any, words: str
) -> None:
    counts = dict(engine.counts)
    for call in (engine.generate, lambda *args, **kwargs: list(engine.stream(*args, **kwargs))):
        with pytest.raises(ConfigError, match="structured_outputs") as error:
            call(prompt, max_tokens=4, structured_outputs=constraint)
        assert words in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert "/project/" not in str(error.value)
    assert dict(engine.counts) == counts
    assert engine.generate(prompt, max_tokens=2).stats.decision == "blend"


def test_special_tokens_are_kept_on_request(engine: TransformersEngine, prompt: str) -> None:
    choice = {"structured_outputs": {"choice": ["<|im_start|>yes"]}, "max_tokens": 30}
    kept = engine.generate(prompt, **choice, skip_special_tokens=False)
    assert kept.text == "<|im_start|>yes"  # without what ends it
    assert engine.decode(kept.token_ids[:-1]) == kept.text
    assert "".join(engine.stream(prompt, **choice, skip_special_tokens=False)) == kept.text
    with pytest.raises(ConfigError, match="skip_special_tokens"):
        engine.generate(prompt, skip_special_tokens="no")


def test_without_xgrammar_it_is_one_clear_line(smollm2: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(smollm2) as engine:
        monkeypatch.setitem(sys.modules, "xgrammar", None)
        with pytest.raises(ConfigError, match=re.escape("pip install 'cacheblend-rag[structured]'")) as error:
            engine.generate("Once", max_tokens=2, structured_outputs={"choice": ["a"]})
        assert len(str(error.value).splitlines()) == 1
        assert not engine.counts
        assert engine.generate("Once", max_tokens=2).text
        monkeypatch.undo()
        assert engine.generate("Once", max_tokens=4, structured_outputs={"choice": ["a"]}).text == "a"


def test_text_that_the_model_has_no_tokens_for(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    compiler = GrammarCompiler(byte_tokenizer, 257, {256})
    matcher = compiler.matcher(structural_tag({"choice": ["ab"]}))
    logits = torch.zeros(257)
    (a,), (b,) = byte_tokenizer.encode("a"), byte_tokenizer.encode("b")
    for token in (a, b, 256):
        assert matcher.constrain(logits).isfinite().nonzero().flatten().tolist() == [token]
        matcher.accept(token)
    small = GrammarCompiler(byte_tokenizer, 10, {9})  # the first ten bytes
    with pytest.raises(CacheBlendError, match="no tokens for"):
        small.matcher(structural_tag({"choice": ["日"]})).constrain(torch.zeros(10))
    with pytest.raises(ConfigError, match="can't be used with this tokenizer"):
        GrammarCompiler(byte_tokenizer, 257, set())


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if tools %}{{ tools | length }}{% endif %}"
)


def test_a_chat_template_of_ones_own(random_models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    for template in (TEMPLATE, str(file), file):
        with load_engine(random_models["qwen2"], chat_template=template) as engine:
            assert engine.render_chat([{"role": "user", "content": "ü"}], tools=[{}]) == "[user] ü\n1"
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for bad in (str(tmp_path / "missing.jinja"), str(tmp_path), str(tmp_path / "binary"), "", "no\0file"):
        with pytest.raises(ConfigError, match="is no Jinja template and no file") as error:
            load_engine(random_models["qwen2"], chat_template=bad)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="chat_template is the server's"):
        load_engine("some", engine="server", base_url="http://localhost:1/v1", chat_template=TEMPLATE)


def test_another_chat_template_reads_the_same_chunks(make_model: Any, store_dir: Path) -> None:
    model, chunk = make_model("llama", model_type="llama"), random_text(1, 100)
    with load_engine(model, store=store_dir) as engine:
        engine.warm([chunk])
    with load_engine(model, store=store_dir, chat_template=TEMPLATE) as engine:
        assert engine.is_warm([chunk]) == [True]


def test_what_a_template_is_given(random_models: dict[str, str]) -> None:
    template = "{{ messages | tojson }}{{ tools | tojson }}{{ add_generation_prompt }}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
    with load_engine(random_models["qwen2"], chat_template=template) as engine:
        assert engine.render_chat(messages, tools=[{"x": 1}], add_generation_prompt=False) == (
            '[{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": '
            '{"name": "f", "arguments": {"a": 1}}}]}, {"role": "tool", "content": "1"}][{"x": 1}]False'
        )
        assert call["function"]["arguments"] == '{"a": 1}'  # as it was
        assert engine.render_chat(messages[1:], tools=[]) == '[{"role": "tool", "content": "1"}]nullTrue'
        for bad in ("{", "[1"):
            call["function"]["arguments"] = bad
            with pytest.raises(ConfigError, match="refuses these messages"):
                engine.render_chat(messages)
