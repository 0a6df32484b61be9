"""What blended prompts share through vLLM's prefix cache, and what nobody must find there (I3)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import BlendConfig
from cacheblend_rag.chunks import ChunkScope, ModelFingerprint
from cacheblend_rag.matching import Segment
from cacheblend_rag.vllm.isolation import BlockHashes, Marks, Salts

from .conftest import (
    CHUNKS,
    Case,
    Engines,
    alone,
    assert_alike,
    connectors,
    forget_prefixes,
    random_text,
    scheduler,
    together,
)

BLOCK = 32
SYSTEM = "You answer from passages, and only from those. " + random_text(77, 150) + "\n"


@pytest.fixture
def case(engines: Engines, model: str) -> Case:
    engine = engines.get(model, engine_args={"block_size": BLOCK})
    engine.warm(CHUNKS)
    forget_prefixes(engine)
    return Case(engine, CHUNKS)


def prompt(question: str, *numbers: int) -> str:
    passages = "\n".join(f"Passage: {CHUNKS[n]}" for n in numbers)
    return f"{SYSTEM}{passages}\nQuestion: {question}\nAnswer:"


def test_a_system_prompt_is_shared_with_everybody(case: Case) -> None:
    blended = case.engine.generate(prompt("What of it?", 0, 1), max_tokens=1)
    other = case.engine.generate(prompt("And this?", 2, 3), max_tokens=1)
    plain = case.engine.generate(prompt("What of it?", 0, 1), max_tokens=1, blend={"mode": "off"})
    whole_blocks = len(SYSTEM) // BLOCK * BLOCK
    assert blended.stats.prefix_tokens == 0
    assert (other.stats.decision, other.stats.prefix_tokens) == ("blend", whole_blocks)
    assert (plain.stats.decision, plain.stats.prefix_tokens) == ("prefix", whole_blocks)


def test_a_repeat_finds_all_its_full_blocks(case: Case) -> None:
    text = prompt("What of it?", 0, 1)
    first = case.engine.generate(text, max_tokens=6, logprobs=3)
    again = case.engine.generate(text, max_tokens=6, logprobs=3)
    assert again.stats.prefix_tokens == (len(text) - 1) // BLOCK * BLOCK
    assert_alike([again], [first])


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
def test_the_second_turn_finds_the_first(case: Case, policy: str) -> None:
    first = prompt("What of it?", 0, 1)
    answer = case.engine.generate(first, max_tokens=40, blend={"policy": policy})
    second = case.ids(first) + answer.token_ids + case.ids("\nQuestion: And then?\nAnswer:")
    turn = case.engine.generate(second, max_tokens=1, blend={"policy": policy})
    # The last generated token's KV is not there yet when the first turn ends.
    whole_blocks = (len(first) + len(answer.token_ids) - 1) // BLOCK * BLOCK
    assert turn.stats.prefix_tokens == whole_blocks
    assert turn.stats.reason == "goes on from blended blocks in the prefix cache"


def test_a_second_turn_is_blended_for_itself_if_the_first_is_gone(case: Case) -> None:
    """And leaves nothing behind that the first would find."""
    settings: dict[str, Any] = {"max_tokens": 4, "logprobs": 3}
    prompt = case.prompt(1)
    turn = prompt + " It goes on and on. Question: who was it, then, and what did they say?\nAnswer:"
    (first,) = alone(case, [prompt], **settings)
    (second,) = alone(case, [turn], **settings)
    case.engine.generate(prompt, **settings)
    forget_prefixes(case.engine)
    again = case.engine.generate(turn, **settings)
    assert_alike([again, case.engine.generate(prompt, **settings)], [second, first])


def test_a_second_turn_with_new_passages_goes_on_from_the_first(case: Case) -> None:
    first = prompt("What of it?", 0, 1)
    answer = case.engine.generate(first, max_tokens=40)
    more = f"\nPassage: {CHUNKS[4]}\nQuestion: And then?\nAnswer:"
    turn = case.engine.generate(case.ids(first) + answer.token_ids + case.ids(more), max_tokens=1)
    assert turn.stats.prefix_tokens == (len(first) + len(answer.token_ids) - 1) // BLOCK * BLOCK
    assert turn.stats.decision == "blend"
    assert turn.stats.reused_tokens > 0.7 * len(CHUNKS[4])


def test_only_policies_that_read_the_question_keep_questions_apart(case: Case) -> None:
    def hit(policy: str) -> int:
        forget_prefixes(case.engine)
        case.engine.generate(prompt("What of it?", 0, 1), max_tokens=1, blend={"policy": policy})
        other = case.engine.generate(prompt("Who was there?", 0, 1), max_tokens=1, blend={"policy": policy})
        return other.stats.prefix_tokens

    for policy in ("query_aware", "hybrid"):
        assert hit(policy) == len(SYSTEM) // BLOCK * BLOCK
    for policy in ("hkvd", "hkvd_kv", "chunk_heads", "random", "none"):
        assert hit(policy) >= len(prompt("", 0, 1)) // BLOCK * BLOCK - BLOCK


@pytest.mark.parametrize(
    "change",
    [
        {"recompute_ratio": 0.4},
        {"policy": "hkvd"},
        {"policy": "hkvd", "check_layers": [2]},
        {"forced_tokens": 2},
        {"recompute_ratio": "auto"},
        {"question_layers": [0, 1]},
        {"mode": "off"},
    ],
    ids=str,
)
def test_other_settings_never_meet(case: Case, change: dict[str, Any]) -> None:
    text = prompt("What of it?", 0, 1)
    alone = case.engine.generate(text, max_tokens=6, logprobs=3, blend=change)
    forget_prefixes(case.engine)
    case.engine.generate(text, max_tokens=6)
    after = case.engine.generate(text, max_tokens=6, logprobs=3, blend=change)
    assert after.stats.prefix_tokens == len(SYSTEM) // BLOCK * BLOCK
    assert_alike([after], [alone])


def test_generated_blocks_are_kept_apart_too(case: Case) -> None:
    """A prompt shorter than a block: its first full block is filled by what is generated."""
    engine = case.engine
    short = random_text(500, 24)
    engine.warm([short])
    text = short[:20] + "a?"
    blended = engine.generate(text, max_tokens=60, blend={"recompute_ratio": 0.0}, logprobs=3)
    assert blended.stats.decision == "blend"
    whole = case.ids(text) + blended.token_ids
    plain = engine.generate(whole, max_tokens=2, blend={"mode": "off"})
    assert plain.stats.prefix_tokens == 0


def test_a_next_turn_goes_on_however_little_it_spares(case: Case) -> None:
    """To plain prefix caching's eyes, what was answered before would be computed twice."""
    passages = "\n\n".join(case.chunks[:4])
    ids = case.ids(f"Read these passages, then answer.\n{passages}\n\nQuestion: what comes next, and why?\nAnswer:")
    too_much = {"mode": "auto", "min_reused_tokens": len(ids) - 10}
    reason = case.engine.generate(ids, max_tokens=1, blend=too_much).stats.reason
    reused, cost = map(int, re.findall(r"\d+", reason)[:2])
    auto = {"mode": "auto", "min_reused_tokens": reused - cost}
    forget_prefixes(case.engine)
    first = case.engine.generate(ids, max_tokens=1, blend=auto).stats
    assert first.decision == "blend"
    turn = [*ids, *case.ids(random_text(77, 60) + " And then, what else comes, and why?")]
    second = case.engine.generate(turn, max_tokens=1, blend=auto).stats
    assert second.reason == "goes on from blended blocks in the prefix cache"
    assert second.prefix_tokens >= len(ids) - 128
    forget_prefixes(case.engine)
    alone = case.engine.generate(turn, max_tokens=1, blend=auto).stats
    assert alone.decision == "prefill"  # by itself it would not pay


def test_another_question_goes_on_from_the_same_passages_however_little_it_spares(case: Case) -> None:
    """A policy that does not look at the question blends them alike, so that plain prefill would compute them again."""
    case.engine.generate(prompt("What of it?", 0, 1), max_tokens=1, blend={"policy": "hkvd"})
    other = {"policy": "hkvd", "mode": "auto", "min_reused_tokens": len(prompt("", 0, 1)) - len(SYSTEM)}
    blended = case.engine.generate(prompt("Who was there?", 0, 1), max_tokens=1, blend=other).stats
    assert blended.prefix_tokens >= len(prompt("", 0, 1)) // BLOCK * BLOCK - BLOCK


def test_prompts_that_are_not_blended_keep_their_hasher(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vllm calls it for each token: ours would be slower."""
    half = connectors(case.engine)[0]._scheduler
    plan_blends, kept = half._plan_blends, []

    def note(plan: Any) -> None:
        before = plan.request._block_hasher
        plan_blends(plan)
        kept.append(plan.request._block_hasher is before)

    monkeypatch.setattr(half, "_plan_blends", note)
    little = {"mode": "auto", "min_reused_tokens": 300}
    plain = [
        case.engine.generate(text, max_tokens=1, blend=little).stats.decision
        for text in (prompt("What of it?", 0, 1), random_text(78, 400))
    ]
    assert (kept, plain) == ([True, True], ["prefill", "prefill"])


def test_exact_blocks_that_vanish_before_scheduling_are_not_replaced_by_blended_ones(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At arrival the first passage is in the prefix cache, exactly; when the request is scheduled, it is not."""
    engine = case.engine
    text = prompt("What of it?", 0, 1)
    plain = engine.generate(text, max_tokens=4, logprobs=3, blend={"mode": "off"})
    cut = text.index(CHUNKS[1])
    forget_prefixes(engine)
    engine.generate(text[:cut], max_tokens=1, blend={"mode": "off"})  # leaves the exact first passage behind
    half = connectors(engine)[0]._scheduler
    arrive = half.new_request

    def arrive_and_forget(request: Any) -> None:
        arrive(request)
        assert half._plans[request.request_id].marks[0][0] >= (cut - 40) // BLOCK
        assert scheduler(engine).kv_cache_manager.reset_prefix_cache()

    monkeypatch.setattr(half, "new_request", arrive_and_forget)
    auto = {"mode": "auto", "min_reused_tokens": 1}
    blended = engine.generate(text, max_tokens=4, blend=auto)
    monkeypatch.undo()
    assert (blended.stats.decision, blended.stats.prefix_tokens) == ("blend", 0)
    after = engine.generate(text, max_tokens=4, logprobs=3, blend={"mode": "off"})
    assert after.logprobs == plain.logprobs


def test_auto_uses_exact_blocks_first_and_never_writes_them(case: Case) -> None:
    engine = case.engine
    text = prompt("What of it?", 0, 1)
    auto = {"mode": "auto", "min_reused_tokens": 1}
    plain = engine.generate(text, max_tokens=4, logprobs=3, blend={"mode": "off"})
    whole = (len(text) - 1) // BLOCK * BLOCK
    exact = engine.generate(text, max_tokens=4, logprobs=3, blend=auto)
    assert (exact.stats.decision, exact.stats.prefix_tokens) == ("prefix", whole)
    assert exact.token_ids == plain.token_ids
    forced = engine.generate(text, max_tokens=4)  # mode="blend" blends what it could have had from the cache
    assert (forced.stats.decision, forced.stats.prefix_tokens) == ("blend", len(SYSTEM) // BLOCK * BLOCK)
    assert engine.generate(text, max_tokens=4, logprobs=3, blend={"mode": "off"}).logprobs == plain.logprobs


def test_random_traffic_leaves_plain_answers_alone(case: Case) -> None:
    """Plain and blended prompts over the same passages in random order: plain ones are as if they were alone."""
    rng = random.Random(0)
    texts = [prompt(f"Number {n}?", *rng.sample(range(6), 3)) for n in range(4)]
    alone = []
    for text in texts:
        forget_prefixes(case.engine)
        alone.append(case.engine.generate(text, max_tokens=4, logprobs=3, blend={"mode": "off"}))
    forget_prefixes(case.engine)
    for _ in range(40):
        n = rng.randrange(4)
        mode = rng.choice(["off", "blend", "auto"])
        settings = {"mode": mode, "recompute_ratio": rng.choice([0.0, 0.2]), "min_reused_tokens": 1}
        answer = case.engine.generate(texts[n], max_tokens=4, logprobs=3, blend=settings)
        if mode == "off":
            assert_alike([answer], [alone[n]])


@pytest.mark.parametrize("first", ["off", "blend"])
def test_blocks_that_are_computed_in_the_same_step_are_not_read_before(case: Case, first: str) -> None:
    """vLLM registers blocks when it allocates them: the second prompt hits what the first has yet to compute."""
    engine = case.engine
    texts = [prompt("What of it?", 0, 1), prompt("And this?", 2, 3)]
    modes = [{"mode": first}, {"mode": "blend"}]
    alone = []
    for text, mode in zip(texts, modes, strict=True):
        forget_prefixes(engine)
        alone.append(engine.generate(text, max_tokens=6, blend=mode).token_ids)
    forget_prefixes(engine)
    arguments = [{"max_tokens": 6, "blend": mode} for mode in modes]
    answers = together(engine, list(zip(texts, arguments, strict=True)))
    assert [answer.token_ids for answer in answers] == alone
    assert answers[1].stats.prefix_tokens == len(SYSTEM) // BLOCK * BLOCK


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
def test_the_last_token_of_a_prompt_is_not_read_before_it_is_computed(case: Case, policy: str) -> None:
    """A prompt that ends with a block: its last token is left to vLLM's step, and a longer prompt hits that block."""
    engine = case.engine
    short = prompt("What of it?", 0, 1)
    short = "." * (-len(short) % BLOCK) + short
    long = short + f"\nPassage: {CHUNKS[3]}\nQuestion: And then?"
    alone = []
    for text in (short, long):
        alone.append(engine.generate(text, max_tokens=6, blend={"policy": policy}).token_ids)
    forget_prefixes(engine)
    answers = together(engine, [(text, {"max_tokens": 6, "blend": {"policy": policy}}) for text in (short, long)])
    assert [answer.token_ids for answer in answers] == alone
    assert answers[1].stats.prefix_tokens == len(short)


# Without an engine: hashes of requests, made by vLLM's own hasher.


@pytest.fixture(scope="session")
def make_request() -> Callable[[list[int]], Any]:
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(4, sha256)

    def make(ids: list[int]) -> Any:
        return Request("r", ids, SamplingParams(max_tokens=8), None, block_hasher=hasher)

    return make


@given(
    ids=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    generated=st.lists(st.integers(0, 9), max_size=20),
    share=st.floats(0, 1),
    data=st.data(),
)
def test_salted_hashes_meet_no_plain_ones(
    make_request: Callable[[list[int]], Any], ids: list[int], generated: list[int], share: float, data: st.DataObject
) -> None:
    """From the first blended block on all hashes differ, tokens generated later included; before it none does.

    Salted again, before or after something was generated, a request is as one that was salted so at once.
    """
    first = int(share * (len(ids) - 1)) // 4
    earlier = data.draw(st.integers(0, first))
    plain, salted, resalted, resumed, at_once = (make_request(ids) for _ in range(5))
    BlockHashes(salted).salt(((first, "a"),))
    BlockHashes(at_once).salt(((earlier, "a"),))
    hashes, later = BlockHashes(resalted), BlockHashes(resumed)
    hashes.salt(((first, "a"),))
    hashes.salt(())
    assert resalted.block_hashes == plain.block_hashes
    hashes.salt(((earlier, "a"),))
    later.salt(((first, "a"),))
    for request in (plain, salted, resalted, resumed, at_once):
        request.append_output_token_ids(generated)
        assert len(request.block_hashes) == (len(ids) + len(generated)) // 4
    later.salt(((earlier, "a"),))
    assert salted.block_hashes[:first] == plain.block_hashes[:first]
    assert not set(salted.block_hashes[first:]) & set(plain.block_hashes)
    assert resalted.block_hashes == resumed.block_hashes == at_once.block_hashes
    assert resalted.block_hashes[:earlier] == plain.block_hashes[:earlier]
    assert not set(resalted.block_hashes[earlier:]) & set(plain.block_hashes)


marks_of_a_prompt = st.dictionaries(st.integers(0, 12), st.sampled_from("ab"), min_size=1, max_size=3).map(
    lambda marks: tuple(sorted(marks.items()))
)


@given(
    ids=st.lists(st.integers(0, 9), min_size=30, max_size=50),
    changed=st.integers(0, 80),
    marks=marks_of_a_prompt,
    other_marks=marks_of_a_prompt,
)
def test_blocks_are_shared_by_what_is_read_and_salted_alike(
    make_request: Callable[[list[int]], Any], ids: list[int], changed: int, marks: Marks, other_marks: Marks
) -> None:
    """Two requests share a block's hash if and only if its plain hash and the marks up to it are the same."""
    other_ids = list(ids)
    if changed < len(ids):
        other_ids[changed] += 10
    one, other = make_request(ids), make_request(other_ids)
    plain, other_plain = list(one.block_hashes), list(other.block_hashes)
    BlockHashes(one).salt(marks)
    BlockHashes(other).salt(other_marks)
    for block, (known, asked) in enumerate(zip(one.block_hashes, other.block_hashes, strict=True)):
        alike = [mark for mark in marks if mark[0] <= block] == [mark for mark in other_marks if mark[0] <= block]
        assert (known == asked) == (alike and plain[block] == other_plain[block])
    assert not set(one.block_hashes) & set(other_plain[marks[0][0] :])


def test_blocks_are_told_apart_by_what_events_call_them(make_request: Callable[[list[int]], Any]) -> None:
    """By default vLLM's events name a block by the last 8 bytes of its hash."""
    requests = [make_request(list(range(40))) for _ in range(3)]
    BlockHashes(requests[1]).salt(((0, "a"),))
    BlockHashes(requests[2]).salt(((0, "b"),))
    names = [block_hash[-8:] for request in requests for block_hash in request.block_hashes]
    assert len(set(names)) == len(names) == 30


def test_hashes_go_on_from_where_a_streamed_prompt_goes_on(make_request: Callable[[list[int]], Any]) -> None:
    """vLLM takes back what was generated last when more of a prompt comes."""
    request, at_once = make_request(list(range(30))), make_request([*range(30), 1, 2, 8, 9, 8, 9])
    BlockHashes(request).salt(((3, "a"),))
    BlockHashes(at_once).salt(((3, "a"),))
    request.append_output_token_ids([1, 2, 3, 4, 5, 6])
    del request._all_token_ids[32:]
    del request.block_hashes[8:]
    request.append_output_token_ids([8, 9, 8, 9])
    assert request.block_hashes == at_once.block_hashes


def test_hashes_are_plain_when_salting_fails(make_request: Callable[[list[int]], Any]) -> None:
    request, plain = make_request(list(range(30))), make_request(list(range(30)))
    made = request._block_hasher

    def fail(request: Any) -> list[bytes]:
        raise RuntimeError("no hash")

    request._block_hasher = fail
    hashes = BlockHashes(request)
    with pytest.raises(RuntimeError, match="no hash"):
        hashes.salt(((3, "a"),))
    assert request._block_hasher is fail
    assert request.block_hashes == plain.block_hashes
    request._block_hasher = made
    for one in (request, plain):
        one.append_output_token_ids([1, 2, 3, 4])
    assert request.block_hashes == plain.block_hashes


def salts() -> Salts:
    return Salts(ChunkScope("n", ModelFingerprint("", "", "", "", ""), ()), 4)


def choose_and_keep(
    chooser: Salts, ids: list[int], plain: tuple[bytes, ...], segments: list[Segment], config: BlendConfig
) -> Marks:
    """As for a prompt that is blended."""
    prompt = np.asarray(ids, np.int32)
    marks = chooser.choose(prompt, plain, segments, config, 1)
    chooser.remember(prompt, plain, segments, config, frozenset(), marks)
    return marks


def hashes_of(make_request: Callable[[list[int]], Any], ids: list[int]) -> tuple[bytes, ...]:
    return BlockHashes(make_request(ids)).plain


def test_a_renewed_salt_is_another(make_request: Callable[[list[int]], Any]) -> None:
    ids = list(range(30))
    segments = [Segment(4, 20, "k", 0)]
    chooser = salts()
    arguments = (chooser, ids, hashes_of(make_request, ids), segments, BlendConfig())
    marks = choose_and_keep(*arguments)
    assert choose_and_keep(*arguments) == marks
    chooser.renew()
    others = choose_and_keep(*arguments)
    assert others != marks
    assert choose_and_keep(*arguments) == others
    chooser.renew()
    assert choose_and_keep(*arguments) not in (marks, others)


def test_a_prompt_that_is_not_blended_after_all_is_not_gone_on_from(make_request: Callable[[list[int]], Any]) -> None:
    """Nobody has blended the blocks that its salts stand for."""
    chooser, segments = salts(), [Segment(4, 20, "k", 0)]

    def planned(ids: list[int]) -> Marks:
        return chooser.choose(np.asarray(ids, np.int32), hashes_of(make_request, ids), segments, BlendConfig(), 1)

    first, next_turn = [*range(28), 1], [*range(28), 1, 5, 6, 7, 8, 9]
    assert planned(first) != planned(next_turn)
    marks = choose_and_keep(chooser, first, hashes_of(make_request, first), segments, BlendConfig())
    assert planned(next_turn) == marks


def test_a_next_turn_leaves_out_what_the_turn_before_left_out(make_request: Callable[[list[int]], Any]) -> None:
    """Longest first; with the same settings only."""
    chooser, segments = salts(), [Segment(4, 20, "k", 0)]
    first, second = [*range(28), 1], [*range(28), 1, *range(30, 40)]

    def keep(ids: list[int], left_out: str) -> None:
        plain = hashes_of(make_request, ids)
        marks = chooser.choose(np.asarray(ids, np.int32), plain, segments, BlendConfig(), 1)
        chooser.remember(np.asarray(ids, np.int32), plain, segments, BlendConfig(), frozenset(left_out), marks)

    def left_out(ids: list[int], **settings: Any) -> set[str]:
        prompt, plain = np.asarray(ids, np.int32), hashes_of(make_request, ids)
        return set(chooser.left_out_before(prompt, plain, BlendConfig(**settings)))

    keep(first, "ab")
    assert left_out(first) == left_out(second) == {"a", "b"}
    assert left_out([*range(28), 2, *range(30, 40)]) == left_out(second, recompute_ratio=0.5) == set()
    keep(second, "c")
    assert left_out([*second, 7]) == {"c"}
    assert left_out(first) == {"a", "b"}


@pytest.mark.parametrize("hashed", [True, False])
def test_every_token_counts(make_request: Callable[[list[int]], Any], hashed: bool) -> None:
    """Without block hashes too: vLLM makes none if it caches no prefixes, and workers tell prompts by their salts."""
    marks = set()
    for changed in range(30):
        ids = list(range(30))
        ids[changed] += 100
        plain = hashes_of(make_request, ids) if hashed else ()
        marks.add(salts().choose(np.asarray(ids, np.int32), plain, [Segment(4, 10, "k", 0)], BlendConfig(), 1))
    assert len(marks) == 30


def test_settings_are_remembered_beside_each_other(make_request: Callable[[list[int]], Any]) -> None:
    """A next turn finds the turn before it that was asked for with the same settings."""
    segments = [Segment(4, 20, "k", 0)]
    chooser = salts()

    def choose(ids: list[int], ratio: float) -> Marks:
        plain = hashes_of(make_request, ids)
        return choose_and_keep(chooser, ids, plain, segments, BlendConfig(recompute_ratio=ratio))

    first, second = choose([*range(28), 1], 0.1), choose([*range(28), 1], 0.2)
    assert first != second
    assert choose([*range(28), 1, 5, 6, 7, 8, 9], 0.1) == first
    assert choose([*range(28), 1, 5, 6, 7, 8, 9], 0.2) == second


def test_another_question_within_the_last_block_is_no_second_turn(make_request: Callable[[list[int]], Any]) -> None:
    """The full blocks are the same, the prompt is not."""
    segments = [Segment(4, 20, "k", 0)]
    chooser = salts()

    def choose(ids: list[int]) -> Marks:
        plain = hashes_of(make_request, ids)
        return choose_and_keep(chooser, ids, plain, list(segments), BlendConfig())

    first = choose([*range(28), 1])
    assert choose([*range(28), 2]) != first
    assert choose([*range(28), 1, 5, 6, 7, 8, 9]) == first
    assert choose([*range(28), 2, 5, 6, 7, 8, 9]) != first


def test_new_chunks_of_a_next_turn_are_kept_apart_by_their_question(make_request: Callable[[list[int]], Any]) -> None:
    """The chunk is chosen from with its own question in mind; all before it is the turn before's."""
    chooser = salts()
    old, new = Segment(4, 20, "k", 0), Segment(40, 17, "l", 0)

    def choose(ids: list[int], *segments: Segment) -> Marks:
        plain = hashes_of(make_request, ids)
        return choose_and_keep(chooser, ids, plain, list(segments), BlendConfig())

    first = choose([*range(28), 1], old)
    turn = choose([*range(28), 1, *range(30, 60)], old, new)
    other = choose([*range(28), 1, *range(30, 59), 7], old, new)
    assert [mark[0] for mark in turn] == [1, 10]
    assert turn[0] == other[0] == first[0]
    assert turn[1] != other[1]
    assert choose([*range(28), 1, *range(30, 60), 3, 4, 5, 6], old, new) == turn


@given(ids=st.lists(st.integers(0, 9), min_size=30, max_size=60), data=st.data())
def test_each_mark_counts_from_its_block_on(
    make_request: Callable[[list[int]], Any], ids: list[int], data: st.DataObject
) -> None:
    blocks = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=3, unique=True).map(sorted))
    grown = data.draw(st.integers(0, len(ids)))
    marks = tuple((block, f"s{block}") for block in blocks)
    whole, step_by_step, fewer = make_request(ids), make_request(ids[:grown] or ids[:1]), make_request(ids)
    BlockHashes(whole).salt(marks)
    hashes = BlockHashes(step_by_step)
    if blocks[0] <= len(hashes.plain):
        hashes.salt(marks)
        for token in ids[max(grown, 1) :]:
            step_by_step.append_output_token_ids(token)
        assert step_by_step.block_hashes == whole.block_hashes
    BlockHashes(fewer).salt(marks[:1])
    if len(marks) > 1:
        assert whole.block_hashes[: blocks[1]] == fewer.block_hashes[: blocks[1]]
        assert not set(whole.block_hashes[blocks[1] :]) & set(fewer.block_hashes)
