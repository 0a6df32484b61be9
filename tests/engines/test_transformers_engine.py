"""What users of the embedded engine rely on, against the same model without us."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from cacheblend_rag import (
    BlendConfig,
    ChunkTooLongError,
    ConfigError,
    PromptTooLongError,
    StoreError,
    UnsupportedModelError,
    load_engine,
)
from cacheblend_rag.engines.base import SamplingParams
from cacheblend_rag.engines.decoding import TextStream
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.errors import AnswerTimeoutError, EngineClosedError
from cacheblend_rag.store import MemoryStore

from .conftest import open_engine, random_text

FACTS = [
    "The lighthouse on Gannow Isle was built in 1874 by the engineer Dorothea Flane. Its lamp burns whale oil no more, "
    "but the tower of grey stone still stands ninety steps above the harbour and is painted white every third spring.",
    "The ferry from Port Harrask leaves at seven in the morning and again at four in the afternoon. In winter there is "
    "only the morning boat, and none at all when the wind comes from the north, which it does on most days of January.",
    "The Salt Festival takes place in the second week of August. A mayor is weighed against sacks of salt, the salt is "
    "given to the poor, and the evening ends with a procession of lanterns along the quay and a supper of smoked eel.",
]
QUESTION = "In which year was the lighthouse built? Answer with the year only."


@pytest.fixture(scope="module")
def engine(smol: TransformersEngine) -> TransformersEngine:
    smol.warm(FACTS)
    return smol


@pytest.fixture(scope="module")
def quick(small_smollm2: str) -> Iterator[TransformersEngine]:
    """For what does not depend on answers that make sense."""
    with open_engine(small_smollm2) as engine:
        engine.warm(FACTS)
        yield engine


@pytest.fixture(scope="module")
def stock(smollm2: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2)


def rag_prompt(engine: TransformersEngine) -> str:
    content = "\n\n".join([FACTS[2], FACTS[0], FACTS[1]]) + f"\n\n{QUESTION}"
    return engine.render_chat([{"role": "user", "content": content}])


def test_unknown_prompts_read_as_without_this_package(
    engine: TransformersEngine, stock: tuple[PreTrainedModel, PreTrainedTokenizerFast]
) -> None:
    model, tokenizer = stock
    for content in ("Name three colours.", "Write one sentence about rain. " * 20):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, return_tensors="pt")
        expected = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        generation = engine.generate(prompt, max_tokens=12)
        assert generation.stats.decision == "prefill"
        assert generation.token_ids == expected.tolist()
        assert generation.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_blended_answer_is_right(engine: TransformersEngine) -> None:
    prompt = rag_prompt(engine)
    full = engine.generate(prompt, max_tokens=20, blend={"mode": "off"})
    blended = engine.generate(prompt, max_tokens=20, blend={"recompute_ratio": 0.3})
    assert "1874" in full.text
    assert "1874" in blended.text
    assert blended.stats.reused_tokens > 90


def test_logprobs_are_those_of_the_model(
    engine: TransformersEngine, stock: tuple[PreTrainedModel, PreTrainedTokenizerFast]
) -> None:
    model, _ = stock
    prompt = rag_prompt(engine)
    generation = engine.generate(prompt, max_tokens=5, logprobs=4, blend={"recompute_ratio": 1.0})
    ids = engine._prompt_ids(prompt).tolist() + generation.token_ids
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert generation.logprobs is not None
    assert len(generation.logprobs) == len(generation.token_ids) == 5
    for step, logprobs in enumerate(generation.logprobs):
        row = expected[len(ids) - 5 + step - 1]
        assert set(logprobs) == set(row.topk(4).indices.tolist())
        assert generation.token_ids[step] in logprobs
        for token, logprob in logprobs.items():
            assert logprob == pytest.approx(float(row[token]), abs=2e-3)


def test_stop_strings_end_the_text(engine: TransformersEngine) -> None:
    prompt = engine.render_chat([{"role": "user", "content": "Count from one to ten in words, separated by commas."}])
    full = engine.generate(prompt, max_tokens=20)
    for stop in (full.text[7:9], full.text[5:12], "never there", full.text[3]):
        generation = engine.generate(prompt, max_tokens=20, stop=stop)
        found = full.text.find(stop)
        assert generation.text == (full.text[:found] if found >= 0 else full.text)
        assert "".join(engine.stream(prompt, max_tokens=20, stop=[stop, "zzz"])) == generation.text
        if found >= 0:
            assert generation.finish_reason == "stop"
            assert len(generation.token_ids) < len(full.token_ids)


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", "b", "c", " ab", "abc", "bc", "é"]), max_size=8),
    stops=st.lists(st.text("abcé ", min_size=1, max_size=4), max_size=3),
    min_tokens=st.integers(0, 6),
)
def test_stop_strings_that_are_complete_within_min_tokens_do_not_count(
    engine: TransformersEngine, words: list[str], stops: list[str], min_tokens: int
) -> None:
    tokenizer = engine._loaded.tokenizer
    ids = [token for word in words for token in tokenizer.encode(word)]
    stream = TextStream(tokenizer, [], SamplingParams(stop=tuple(stops), min_tokens=min_tokens))
    texts, said = [""], ""
    for count, token in enumerate(ids, start=1):
        texts.append(tokenizer.decode(ids[:count]).rstrip("\ufffd"))
        said += stream.add(token)
        if stream.stopped:
            break
    said += stream.finish()
    assert said == stream.text
    for before, text in itertools.pairwise(texts[min_tokens:]):
        for end in range(len(before) + 1, len(text) + 1):
            if ended_by := [stop for stop in stops if text[:end].endswith(stop)]:
                assert stream.stopped and text == texts[-1]
                assert said in [text[: end - len(stop)] for stop in ended_by]
                return
    assert not stream.stopped
    assert said == texts[-1]


def test_length_and_end_of_sequence(engine: TransformersEngine) -> None:
    prompt = engine.render_chat([{"role": "user", "content": "Say yes."}])
    short = engine.generate(prompt, max_tokens=1)
    assert (short.finish_reason, len(short.token_ids)) == ("length", 1)
    long = engine.generate(prompt, max_tokens=200)
    assert long.finish_reason == "stop"
    assert long.token_ids[-1] in engine._eos
    assert "<|im_end|>" not in long.text


def test_streams_join_to_the_answer(engine: TransformersEngine) -> None:
    for content, tokens in (("Tell me about the sea.", 8), ("Repeat exactly: naïve café — 東京 🙂🙃 and so on", 32)):
        prompt = engine.render_chat([{"role": "user", "content": content}])
        pieces = list(engine.stream(prompt, max_tokens=tokens))
        whole = engine.generate(prompt, max_tokens=tokens)
        assert "".join(pieces) == whole.text
        assert len(pieces) > 3
        assert [piece.generation for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        last = pieces[-1].generation
        assert last is not None
        assert (last.text, last.token_ids, last.finish_reason) == (whole.text, whole.token_ids, whole.finish_reason)
        assert last.stats.ttft > 0


def test_sampling_is_repeatable_by_seed_and_differs_without(quick: TransformersEngine) -> None:
    engine = quick
    prompt = engine.render_chat([{"role": "user", "content": "Write a strange sentence about a goose."}])
    settings: dict[str, Any] = {"max_tokens": 16, "temperature": 1.2, "top_p": 0.95, "top_k": 50}
    first = engine.generate(prompt, seed=1, **settings)
    assert engine.generate(prompt, seed=1, **settings).token_ids == first.token_ids
    others = {tuple(engine.generate(prompt, seed=seed, **settings).token_ids) for seed in range(2, 6)}
    assert len(others | {tuple(first.token_ids)}) > 1
    assert len({tuple(engine.generate(prompt, **settings).token_ids) for _ in range(4)}) > 1
    greedy = engine.generate(prompt, max_tokens=16)
    assert engine.generate(prompt, max_tokens=16, temperature=5.0, top_k=1).token_ids == greedy.token_ids
    assert engine.generate(prompt, max_tokens=16, temperature=5.0, top_p=1e-6).token_ids == greedy.token_ids


def test_prompts_may_be_token_ids_and_lists(quick: TransformersEngine) -> None:
    engine = quick
    prompt = rag_prompt(engine)
    ids = engine._prompt_ids(prompt).tolist()
    one = engine.generate(prompt, max_tokens=4)
    assert engine.generate(ids, max_tokens=4).token_ids == one.token_ids
    batch = engine.generate([ids, ids], max_tokens=4)
    assert [g.token_ids for g in batch] == [one.token_ids] * 2
    assert engine.generate([], max_tokens=4) == []


def test_threads_share_an_engine(quick: TransformersEngine) -> None:
    engine = quick
    prompts = [rag_prompt(engine), *(engine.render_chat([{"role": "user", "content": f"Say {n}."}]) for n in range(5))]
    expected = [engine.generate(prompt, max_tokens=8).token_ids for prompt in prompts]
    got: list[list[int]] = [[] for _ in prompts]

    def run(n: int) -> None:
        got[n] = engine.generate(prompts[n], max_tokens=8).token_ids

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_the_readers_time_is_no_time_of_the_answer(engine: TransformersEngine) -> None:
    stream = engine.stream("Once upon a time", max_tokens=2, ignore_eos=True, timeout=1.5)
    assert next(stream).generation is None
    time.sleep(1.6)
    assert next(stream).generation is not None
    with pytest.raises(AnswerTimeoutError, match=r"more than the timeout of 0\.01 s"):
        list(engine.stream("Once upon a time", max_tokens=40, ignore_eos=True, timeout=0.01))


async def test_a_closed_engine_says_so(small_smollm2: str) -> None:
    engine = open_engine(small_smollm2)
    stream = engine.stream("Once", max_tokens=1)
    engine.close()
    engine.close()
    calls: list[Callable[[], object]] = [
        lambda: engine.warm(["text"]),
        lambda: engine.evict(["text"]),
        lambda: engine.evict_keys(["key"]),
        lambda: engine.is_warm(["text"]),
        lambda: engine.chunk_keys(["text"]),
        lambda: engine.stored_keys(),
        lambda: engine.generate("Once", max_tokens=1),
        lambda: engine.stream("Once", max_tokens=1),
        lambda: next(stream),
        lambda: engine.render_chat([{"role": "user", "content": "Once"}]),
        lambda: engine.decode([1]),
        lambda: engine.count_tokens("Once"),
        lambda: engine.tool_format,
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="closed: load it again"):
            call()
    with pytest.raises(RuntimeError, match="closed"):
        await engine.agenerate("Once", max_tokens=1)
    with pytest.raises(RuntimeError, match="closed"):
        await anext(engine.astream("Once", max_tokens=1))  # type: ignore[call-overload]
    engine.prefetch(["text"])  # which never fails


def test_an_abandoned_stream_blocks_nobody(quick: TransformersEngine) -> None:
    engine = quick
    stream = engine.stream(rag_prompt(engine), max_tokens=30)
    next(stream)
    assert engine.generate("Say yes.", max_tokens=2).token_ids


def test_auto_falls_back_below_min_reused_tokens(quick: TransformersEngine) -> None:
    engine = quick
    prompt = rag_prompt(engine)
    auto = engine.generate(prompt, max_tokens=2, blend=BlendConfig(min_reused_tokens=512))
    assert auto.stats.decision == "prefill"
    assert "min_reused_tokens is 512" in auto.stats.reason
    assert engine.generate(prompt, max_tokens=2, blend=BlendConfig(min_reused_tokens=50)).stats.decision == "blend"
    off = engine.generate(prompt, max_tokens=2, blend={"mode": "off"})
    assert (off.stats.decision, off.stats.reason) == ("prefill", "mode is off")


def test_a_primer_that_begins_the_prompt_is_an_exact_prefix(smollm2: str) -> None:
    system = (
        "<|im_start|>system\nYou answer questions about a small country from the passages given.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    with open_engine(smollm2, primer=system) as engine:
        engine.warm(FACTS)
        prompt = (
            system + "\n\n".join([FACTS[1], FACTS[0], FACTS[2]]) + f"\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        )
        full = engine.generate(prompt, max_tokens=8, logprobs=5, blend={"mode": "off"})
        blended = engine.generate(prompt, max_tokens=8)
        first_chunk = engine.count_tokens(FACTS[1])
        assert blended.stats.prefix_tokens >= engine.count_tokens(system) + first_chunk - 1
        assert blended.stats.segments == 3
        # Nothing but the prefix is reused: exact, to rounding.
        prefix = engine.generate(prompt, max_tokens=8, logprobs=5, blend={"mode": "auto", "min_reused_tokens": 4096})
        assert prefix.stats.decision == "prefix"
        assert prefix.stats.prefix_tokens == blended.stats.prefix_tokens
        assert prefix.token_ids == full.token_ids
        assert full.logprobs is not None and prefix.logprobs is not None
        for expected, got in zip(full.logprobs, prefix.logprobs, strict=True):
            assert got == pytest.approx(expected, abs=1e-3)


def test_chunks_may_be_read_behind_nothing(random_models: dict[str, str]) -> None:
    first, second = random_text(1, 200), random_text(2, 200)
    with open_engine(random_models["qwen2"], primer="") as engine:
        engine.warm([first, second])
        prompt = f"{first}\n\n{second}\n\nWhat comes next?"
        full = engine.generate(prompt, max_tokens=4, blend={"mode": "off"})
        blended = engine.generate(prompt, max_tokens=4, blend={"recompute_ratio": 1.0})
        assert blended.stats.prefix_tokens == 200  # the first chunk stands where it was read
        assert blended.stats.recomputed_tokens > 150
        assert blended.token_ids == full.token_ids


def test_question_before_the_passages_falls_back_to_hkvd(engine: TransformersEngine) -> None:
    prompt = f"<|im_start|>user\n{QUESTION}\n\n" + "\n\n".join(FACTS) + "<|im_end|>\n"
    generation = engine.generate(prompt, max_tokens=2, blend={"policy": "query_aware"})
    assert (generation.stats.decision, generation.stats.policy) == ("blend", "hkvd")
    after = engine.generate(rag_prompt(engine), max_tokens=2, blend={"policy": "query_aware"})
    assert after.stats.policy == "query_aware"


def test_several_check_layers_filter_gradually(engine: TransformersEngine) -> None:
    prompt = rag_prompt(engine)
    one = engine.generate(prompt, max_tokens=4, blend={"policy": "hkvd"})
    several = engine.generate(prompt, max_tokens=4, blend={"policy": "hkvd", "check_layers": (1, 3, 7)})
    assert several.stats.recomputed_tokens == one.stats.recomputed_tokens


def test_a_prompt_that_ends_in_a_chunk_still_computes_its_last_token(engine: TransformersEngine) -> None:
    generation = engine.generate(FACTS[0] + "\n\n" + FACTS[1], max_tokens=2, blend={"recompute_ratio": 0.0})
    assert generation.stats.decision == "blend"
    assert generation.stats.missed_tokens >= 1


def greedy_tokens(reference: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """What the model answers without us."""
    tokens = torch.tensor([ids])
    whole = reference.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False)
    answer: list[int] = whole[0, len(ids) :].tolist()
    return answer


def test_a_sliding_window_is_served_plainly_beyond_it(make_model: Callable[..., str]) -> None:
    directory = make_model("mistral", sliding_window=900)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    chunks = [random_text(seed, 150) for seed in range(4)]
    with open_engine(directory, primer="Some passages. ") as engine:
        engine.warm(chunks)
        within = " - ".join(chunks[:3])
        beyond = within + random_text(9, 600)
        assert engine.generate(within, max_tokens=20).stats.decision == "blend"
        generation = engine.generate(beyond, max_tokens=20)
        assert generation.stats.decision == "prefill"
        assert "900" in generation.stats.reason
        assert generation.token_ids == greedy_tokens(reference, engine._prompt_ids(beyond).tolist(), 20)
        # An answer that would grow beyond the window counts as well.
        assert engine.generate(within, max_tokens=500).stats.decision == "prefill"


def test_longrope_is_served_plainly_beyond_its_original_length(make_model: Callable[..., str]) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * n for n in range(8)],
        "long_factor": [2.0 + n for n in range(8)],
        "original_max_position_embeddings": 900,
        "factor": 2.0,
    }
    directory = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=900)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    chunks = [random_text(seed, 150) for seed in range(4)]
    with open_engine(directory, primer="Some passages. ") as engine:
        engine.warm(chunks)
        within = " - ".join(chunks[:3])
        beyond = within + random_text(9, 600)
        for prompt, decision in ((beyond, "prefill"), (within, "blend"), (beyond, "prefill")):
            generation = engine.generate(prompt, max_tokens=12, blend={"recompute_ratio": 1.0})
            assert generation.stats.decision == decision
            assert generation.token_ids == greedy_tokens(reference, engine._prompt_ids(prompt).tolist(), 12)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
        ("gemma2", {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16}),
        (
            "deepseek_v3",
            {
                "model_type": "deepseek_v3",
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "n_routed_experts": 4,
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "first_k_dense_replace": 1,
            },
        ),
    ],
)
def test_models_that_cannot_be_blended_are_refused(
    make_model: Callable[..., str], name: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        open_engine(make_model(name, **changes))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    if name == "gpt2":
        assert "its positions are not rotary" in str(error.value)


def test_bad_settings_say_what_and_what_to_do(quick: TransformersEngine, small_smollm2: str, tmp_path: Path) -> None:
    engine, smollm2 = quick, small_smollm2
    prompt = "Say yes."
    bad: list[tuple[str, Callable[[], object]]] = [
        ("recompute_ratio must be", lambda: engine.generate(prompt, blend={"recompute_ratio": 1.5})),
        (
            "known are chunk_heads, hkvd, hkvd_kv, hybrid, none, query_aware, random",
            lambda: engine.generate(prompt, blend={"policy": "best"}),
        ),
        ("unknown blend setting", lambda: engine.generate(prompt, blend={"ratio": 0.1})),
        ("unknown sampling setting", lambda: engine.generate(prompt, max_new_tokens=3)),
        ("check_layers", lambda: engine.generate(prompt, blend={"check_layers": (99,)})),
        ("question_layers", lambda: engine.generate(prompt, blend={"question_layers": (1, 99)})),
        ("question_layers", lambda: open_engine(smollm2, blend=BlendConfig(question_layers=(1, 99)))),
        ("mode must be", lambda: engine.generate(prompt, blend={"mode": "on"})),
        ("temperature", lambda: engine.generate(prompt, temperature=-1.0)),
        ("top_p", lambda: engine.generate(prompt, top_p=0.0)),
        ("stop", lambda: engine.generate(prompt, stop=[""])),
        ("max_tokens", lambda: engine.generate(prompt, max_tokens=0)),
        ("no tokens", lambda: engine.generate("")),
        ("vocabulary", lambda: engine.generate([1, 10**6])),
        ("does not exist", lambda: load_engine("./no-such-model")),
        ("no directory and no hub model", lambda: load_engine("no-such/model")),
        ("not a transformers model", lambda: load_engine(tmp_path)),
        ("dtype must be", lambda: open_engine(smollm2, dtype="int3")),
        ("device", lambda: open_engine(smollm2, device="tpu9")),
        ("unknown engine", lambda: load_engine(smollm2, engine="abacus")),
        ("primer", lambda: open_engine(smollm2, primer="long " * 9000)),
    ]
    for message, call in bad:
        with pytest.raises(ConfigError) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_too_long_prompts_and_chunks(engine: TransformersEngine) -> None:
    with pytest.raises(PromptTooLongError, match="8192"):
        engine.generate("word " * 9000, max_tokens=4)
    with pytest.raises(PromptTooLongError):
        engine.generate("Say yes.", max_tokens=8192)
    fresh = random_text(77, 90)
    with pytest.raises(ChunkTooLongError, match="chunk 1 "):
        engine.warm([fresh, "word " * 9000])
    # Nothing was done by halves.
    assert engine.warm([fresh]).stored == 1


def test_unwritable_store_is_one_clear_error(small_smollm2: str, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a directory")
    with pytest.raises(StoreError) as error:
        load_engine(small_smollm2, store=in_the_way / "store")
    assert "\n" not in str(error.value)


def test_warm_and_evict_report_what_they_did(small_smollm2: str, store_dir: Path) -> None:
    seen: list[tuple[int, int]] = []
    with load_engine(small_smollm2, store=store_dir, dtype="float32", device="cpu") as engine:
        first = engine.warm([*FACTS, FACTS[0], ""], progress=lambda done, total: seen.append((done, total)))
        assert (first.stored, first.already_there) == (3, 2)
        assert first.tokens == sum(engine.count_tokens(text) for text in FACTS)
        # 4 layers, keys and values, 2 heads of 32 in float32: what is stored, plus headers and token ids
        assert 0 < first.bytes - first.tokens * 4 * 2 * 2 * 32 * 4 < 3 * 4096
        assert seen == [(n, 5) for n in range(1, 6)]
        assert engine.warm(FACTS).stored == 0
    with load_engine(small_smollm2, store=store_dir, dtype="float32", device="cpu") as engine:
        assert engine.warm(FACTS).stored == 0
        assert engine.evict([FACTS[0], "never warm"]) == 1
        assert engine.evict([FACTS[0]]) == 0
        assert engine.warm(FACTS).stored == 1


def test_chunks_warmed_by_another_engine_are_seen_without_a_restart(small_smollm2: str, store_dir: Path) -> None:
    with (
        load_engine(
            small_smollm2, store=store_dir, dtype="float32", device="cpu", blend=BlendConfig(mode="blend")
        ) as one,
        load_engine(
            small_smollm2, store=store_dir, dtype="float32", device="cpu", blend=BlendConfig(mode="blend")
        ) as two,
    ):
        prompt = "\n\n".join(FACTS) + "\n\nWhat happens in August, and what is given to the poor?"
        assert one.generate(prompt, max_tokens=1).stats.decision == "prefill"
        two.warm(FACTS)
        assert one.generate(prompt, max_tokens=1).stats.segments == 3
        two.evict(FACTS)
        assert one.generate(prompt, max_tokens=1).stats.decision == "prefill"
        two.warm(FACTS[:1])
        assert one.generate(prompt, max_tokens=1).stats.segments == 1


def test_an_evicted_memory_tier_costs_time_not_answers(small_smollm2: str) -> None:
    """A memory store too small for all chunks forgets some: they are misses."""
    with open_engine(small_smollm2, store=MemoryStore(650_000)) as engine:
        engine.warm([random_text(seed, 200) for seed in range(6)])
        assert (
            engine.generate(random_text(5, 200) + "\n\nWhat was that, do you think?", max_tokens=1).stats.segments == 1
        )
        assert (
            engine.generate(random_text(0, 200) + "\n\nWhat was that, do you think?", max_tokens=1).stats.segments == 0
        )


def test_chunks_of_8_bits(random_models: dict[str, str]) -> None:
    """A quarter of the bytes of float32, other chunks than those of another codec, almost the same logits."""
    model = random_models["qwen2"]
    texts = [random_text(seed, 300) for seed in range(60, 64)]
    prompt = "Read.\n" + "\n\n".join(reversed(texts)) + "\n\nQuestion: what comes next, and why?\nAnswer:"
    store = MemoryStore(1 << 30)
    with open_engine(model, store=store) as raw, open_engine(model, store=store, codec="fp8") as engine:
        raw.warm(texts)
        assert engine.is_warm(texts) == [False] * 4
        engine.warm(texts)
        sizes = []
        for each in (engine, raw):
            chunks = [each.library.read(key) for key in each.chunk_keys(texts)]
            sizes.append(sum(chunk.kv.nbytes for chunk in chunks if chunk is not None))
        assert 4 * sizes[0] == sizes[1] > 0
        ids = np.asarray(engine._prompt_ids(prompt), np.int32)

        def distribution(engine: TransformersEngine, **blend: Any) -> torch.Tensor:
            config = BlendConfig(mode="blend").with_overrides(blend)
            return engine._reader.read_prompt(ids, len(ids) + 1, config).logits.log_softmax(dim=-1)

        for ratio in (0.0, 0.15):
            exact = distribution(raw, recompute_ratio=ratio)
            close = distribution(engine, recompute_ratio=ratio)
            assert 0 < float((exact.exp() * (exact - close)).sum()) < 0.05
        plain = distribution(raw, mode="off")
        assert float((distribution(engine, recompute_ratio=1.0) - plain).abs().max()) < 1e-4
