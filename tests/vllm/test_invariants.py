"""I1 (ratio 1 is plain prefill), I2 (exact KV gives exact answers), I3 (no pollution), I4 (shifting), I7 (determinism)
on real vLLM: SmolLM2 and small random models of every kind, in float32, with poisoned KV."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cacheblend_rag import ConfigError, load_engine, policies
from cacheblend_rag.chat import ToolFormat, ToolParser
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.matching import Segment
from cacheblend_rag.vllm.forward import PagedForward

from ..engines.conftest import open_engine as open_embedded
from .conftest import (
    BLEND,
    CHUNKS,
    MOE,
    PRIMER,
    WIDE,
    Case,
    Engines,
    assert_alike,
    computed_kv,
    connectors,
    forget_prefixes,
    inject_exact_kv,
    moved_logits,
    together,
)

TOLERANCE = 1e-4  # largest absolute difference of logits, float32
MODELS = ["smollm2", "llama3-scaled", "llama-yarn", "qwen2", "qwen3", "moe"]


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def directory(name: str, request: pytest.FixtureRequest, make_model: Callable[..., str]) -> str:
    if name == "smollm2":
        path: str = request.getfixturevalue("smollm2")
        return path
    return make_model(name, **WIDE, **(MOE if name == "moe" else {}))


@pytest.fixture
def case(engines: Engines, directory: str, name: str) -> Case:
    engine = engines.get(directory)
    engine.warm(CHUNKS)
    return Case(engine, CHUNKS, passages=2 if name == "smollm2" else 4)


def test_i1_ratio_one_is_plain_prefill(case: Case, name: str) -> None:
    for seed in range(1 if name == "smollm2" else 3):
        prompt = case.prompt(seed)
        plain = case.logits(prompt, mode="off")
        assert max_difference(case.logits(prompt, recompute_ratio=1.0), plain) < TOLERANCE
        # The tolerance means something: reuse without recomputing is far outside of it.
        assert max_difference(case.logits(prompt, recompute_ratio=0.0), plain) > 100 * TOLERANCE


def test_plain_prefill_is_that_of_transformers(case: Case, directory: str) -> None:
    """What the other tests compare with is right."""
    ids = case.ids(case.prompt(0))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0, -1]
    assert max_difference(case.logits(ids, mode="off"), expected) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("shift", [0, 97])
def test_i2_exact_kv_gives_exact_answers(
    case: Case, name: str, shift: int, monkeypatch: pytest.MonkeyPatch, random_policies: None
) -> None:
    """Chunk KV captured from the very prompt, there or at shifted positions: whatever is recomputed, it is exact."""
    ids = case.ids(case.prompt(7))
    segments = inject_exact_kv(case.engine, ids, shift, monkeypatch)
    assert len(segments) == case.passages
    assert any(segment.offset > 10 for segment in segments)

    plain = case.logits(ids, mode="off")
    # Captured at other positions, KV has the rounding of other angles: no better than the model's own logits there.
    tolerance = max(TOLERANCE, max_difference(moved_logits(case.engine, ids, shift), plain))
    assert tolerance < 5 * TOLERANCE
    for policy, ratio in selections(case, name, shift):
        logits = case.logits(ids, recompute_ratio=ratio, policy=policy)
        assert max_difference(logits, plain) < tolerance, (policy, ratio)


def selections(case: Case, name: str, shift: int) -> list[tuple[str, Any]]:
    """Policies and ratios: all of them on random models, a few on real weights, which take a hundred times as long."""
    if name != "smollm2":
        several = list(itertools.product((*case.policies, "random0", "random1", "random2"), (0.0, 0.1, 0.5, 0.95)))
        return [*several, *((policy, "auto") for policy in case.policies)]
    return [("hkvd", 0.1), ("query_aware", 0.1), ("random0", 0.5)] if shift else [("query_aware", 0.0)]


def test_i3_plain_after_blended_is_plain(case: Case) -> None:
    prompt = case.prompt(3)
    forget_prefixes(case.engine)
    before = case.engine.generate(prompt, max_tokens=8, blend={"mode": "off"}, logprobs=5)
    forget_prefixes(case.engine)
    blended = case.engine.generate(prompt, max_tokens=8, blend={"recompute_ratio": 0.0}, logprobs=5)
    after = case.engine.generate(prompt, max_tokens=8, blend={"mode": "off"}, logprobs=5)
    assert blended.stats.decision == "blend"
    assert blended.logprobs != before.logprobs
    assert after.logprobs == before.logprobs
    assert after.token_ids == before.token_ids


@pytest.mark.parametrize(("old", "new"), [(0, 1), (3, 700), (900, 11), (1500, 1501)])
def test_i4_shifted_keys_are_those_computed_there(case: Case, old: int, new: int) -> None:
    rng = np.random.default_rng(old)
    ids = rng.integers(0, 250, size=33).astype(np.int32)
    computed = {position: computed_kv(case.engine, ids.tolist(), position) for position in (old, new)}
    model = connectors(case.engine)[1]._worker._model
    room = max(old, new) + len(ids)
    blocks = list(range(1, 2 + room // model.kv.block_size))
    forward = PagedForward(model, torch.zeros(room, dtype=torch.int64), blocks, 0)
    with torch.inference_mode():
        forward.place([(ChunkKV("", case.engine.scope, ids, old, computed[old]), Segment(new, len(ids), "", 0))])
        shifted = forward.read(new, room - max(old, new) + new)
        forward.place([(ChunkKV("", case.engine.scope, ids, new, shifted), Segment(old, len(ids), "", 0))])
        back = forward.read(old, old + len(ids))
    scale = float(computed[new][0, 0].abs().max())
    assert max_difference(shifted[0, 0], computed[new][0, 0]) < 1e-5 * scale
    assert max_difference(computed[old][0, 0], computed[new][0, 0]) > 1e-2 * scale
    # In deeper layers what is shifted was computed at other positions, and that is where rounding comes from.
    assert max_difference(shifted, computed[new]) < 1e-3 * float(computed[new].abs().max())
    assert max_difference(back, computed[old]) < 1e-5 * float(computed[old].abs().max())
    assert torch.equal(back[:, 1], computed[old][:, 1])
    forget_prefixes(case.engine)


def test_i7_same_prompt_same_tokens_and_batch_as_alone(case: Case) -> None:
    prompts = [case.prompt(seed) for seed in range(2)]
    for policy, ratio in [*((policy, 0.15) for policy in case.policies), ("query_aware", "auto")]:
        blend = {"policy": policy, "recompute_ratio": ratio, "forced_tokens": 2}
        settings = {"max_tokens": 5, "blend": blend, "logprobs": 3}
        forget_prefixes(case.engine)
        alone = [case.engine.generate(p, **settings) for p in prompts]
        repeated = [case.engine.generate(p, **settings) for p in prompts]  # over their own blocks in the prefix cache
        forget_prefixes(case.engine)
        again = [case.engine.generate(p, **settings) for p in prompts]
        forget_prefixes(case.engine)
        batch = case.engine.generate(prompts, **settings)
        for answers in (repeated, again, batch):
            assert_alike(answers, alone, TOLERANCE)
            assert all(a.stats.decision in ("blend", "prefix") for a in answers)


def test_every_policy_chooses_as_in_the_embedded_engine(
    case: Case, directory: str, choices: list[torch.Tensor]
) -> None:
    """Each engine with chunk KV of its own: what differs is rounding."""
    prompt = case.prompt(11, chunks=2)
    used = [text for text in CHUNKS if text[30:60] in prompt]
    with open_embedded(directory, primer=PRIMER) as embedded:
        embedded.warm(used)
        for policy in policies.policy_names():
            blend = {"policy": policy, "recompute_ratio": 0.2, "forced_tokens": 2}
            forget_prefixes(case.engine)
            stats = [one.generate(prompt, max_tokens=1, blend=blend).stats for one in (embedded, case.engine)]
            expected, chosen = (set(positions.tolist()) for positions in choices[-2:])
            assert len(chosen) == len(expected), policy
            assert len(chosen ^ expected) <= 2, policy  # a pair of tokens within rounding of each other
            assert [one.policy for one in stats] == [policy] * 2
            assert [one.recomputed_tokens for one in stats] == [len(chosen) + 2 * 2] * 2
    assert len(choices) == 2 * len(policies.policy_names())


# Constrained answers


HERMES = ToolFormat(
    opening="",
    before_name='<tool_call>\n{"name": "',
    before_arguments='", "arguments": ',
    after_arguments="}\n</tool_call>",
    after_id=None,
    separator="\n",
    closing="",
    marker="<tool_call>",
    call_marker="<tool_call>",
    in_json=True,
    single=False,
)
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {"type": "object", "properties": {"page": {"enum": [1, 2]}}, "required": ["page"]},
    },
}
TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<p>", "content": {"type": "regex", "pattern": "[1-6]{2}"}, "end": "</p>"},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "passage": {"type": "string", "maxLength": 6},
        "number": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["passage", "number"],
}


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_constrained_answers_are_those_of_the_embedded_engine(case: Case, directory: str) -> None:
    blended, free = case.prompt(0), {"max_tokens": 4, "blend": {"mode": "off"}}
    plain = case.engine.generate(blended, **free)
    forget_prefixes(case.engine)
    constraints = [
        {"json": SCHEMA},
        {"choice": ["the first", "the second"]},
        {"structural_tag": TAG},
        {"structural_tag": HERMES.constraint([TOOL], required=True, parallel=False)},
    ]
    asked: list[tuple[str | list[int], dict[str, Any]]] = [
        (blended, {"max_tokens": 120, "structured_outputs": constraint, "logprobs": 3}) for constraint in constraints
    ]
    answers = together(case.engine, asked)
    with load_engine(directory, dtype="float32", primer=PRIMER, namespace="test", blend=BLEND) as embedded:
        embedded.warm([text for text in CHUNKS if text[30:60] in blended])
        expected = [embedded.generate(text, **settings) for text, settings in asked]
    assert_alike(answers, expected, 2e-3)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    for answer in answers:
        assert answer.stats.reused_tokens + answer.stats.prefix_tokens > 100
        assert answer.finish_reason == "stop", answer.text
        assert all(logprob > -1e3 for logprobs in answer.logprobs or [] for logprob in logprobs.values())
    assert answers[0].stats.reused_tokens > 100  # those behind it go on from its blocks
    assert list(json.loads(answers[0].text)) == ["passage", "number"]
    assert answers[1].text in ("the first", "the second")
    assert re.fullmatch("<p>[1-6]{2}</p>", answers[2].text)
    (call,) = ToolParser(HERMES).parse(answers[3].text).tool_calls
    assert call.name == "look_up"
    assert json.loads(call.arguments)["page"] in (1, 2)
    assert case.engine.generate(blended, **free).token_ids == plain.token_ids  # nothing is left of it


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_bad_constraints_are_one_clear_line_and_the_engine_goes_on(case: Case) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    for constraint, words in (
        ({"json": {"type": "nonsense"}}, 'Unsupported type "nonsense"'),
        ({"regex": "(["}, "Unclosed"),
        ({"grammar": "root ::= other"}, '"other" is not defined'),
        ({"structural_tag": {"format": 1}}, "structural tag"),
        ({"yaml": ""}, "one entry of json"),
        ({"json": deep}, "vLLM refuses the request: The JSON schema is nested too deeply"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)) as error:
            case.engine.generate("Once", max_tokens=2, structured_outputs=constraint)
        assert len(str(error.value).splitlines()) == 1
    assert case.engine.generate("Once", max_tokens=2).text
