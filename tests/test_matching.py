"""Matching: sound, complete, the same whatever the order of adding, and bounded on hostile inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import matching, postings
from cacheblend_rag.anchors import GUARANTEED_RUN, sample_anchors
from cacheblend_rag.matching import MIN_RUN, AnchorIndex, Segment
from cacheblend_rag.postings import MAX_POSTINGS
from cacheblend_rag.store.base import IndexedChunk

Corpus = dict[str, np.ndarray]


def ids(values) -> np.ndarray:
    return np.asarray(values, np.int32)


def key_of(tokens: np.ndarray) -> str:
    return hashlib.blake2b(ids(tokens).tobytes(), digest_size=16).hexdigest()


def corpus_of(chunks: Iterable) -> Corpus:
    return {key_of(tokens): ids(tokens) for tokens in chunks}


def indexed(corpus: Corpus) -> list[IndexedChunk]:
    return [IndexedChunk(key, sample_anchors(tokens)) for key, tokens in corpus.items()]


def index_of(corpus: Corpus) -> AnchorIndex:
    index = AnchorIndex()
    index.add(indexed(corpus))
    return index


def match(corpus: Corpus, prompt: np.ndarray) -> list[Segment]:
    return index_of(corpus).match(prompt, corpus.get)


def covered(segments: list[Segment], tokens: int) -> np.ndarray:
    flags = np.zeros(tokens, np.bool_)
    for segment in segments:
        flags[segment.start : segment.end] = True
    return flags


def longest_run(flags: np.ndarray) -> int:
    return max((len(list(run)) for value, run in itertools.groupby(flags.tolist()) if value), default=0)


def assert_sound(segments: list[Segment], corpus: Corpus, prompt: np.ndarray) -> None:
    end = 0
    for segment in segments:
        assert segment.start >= end and segment.length >= MIN_RUN and segment.offset >= 0
        end = segment.end
        chunk = corpus[segment.key]
        assert segment.offset + segment.length <= len(chunk)
        assert np.array_equal(prompt[segment.start : end], chunk[segment.offset : segment.offset + segment.length])
    assert end <= max(len(prompt) - 1, 0)
    for one, two in itertools.pairwise(segments):  # else they would be one segment
        assert (one.end, one.key, one.offset + one.length) != (two.start, two.key, two.offset)


@dataclasses.dataclass
class Case:
    """A corpus and a prompt made of pieces of it."""

    corpus: Corpus
    prompt: np.ndarray


def make_case(rng: np.random.Generator, vocabulary: int, repeats: bool, kin: str) -> Case:
    """Chunks of about 31 to 150 tokens; pieces are whole, cut or edited; glued together or with other tokens between.

    ``kin``: what chunks share: nothing, ``"passages"``, or all are ``"versions"`` of parts of one text.
    """

    def fresh(tokens: int) -> np.ndarray:
        if repeats and rng.random() < 0.5:
            return np.resize(rng.integers(0, vocabulary, rng.integers(1, 41)), tokens)
        return rng.integers(0, vocabulary, tokens)

    def part_of(tokens: np.ndarray) -> np.ndarray:
        size = rng.integers(min(GUARANTEED_RUN, len(tokens)), min(150, len(tokens)) + 1)
        start = rng.integers(0, len(tokens) - size + 1)
        return tokens[start : start + size]

    def edited(tokens: np.ndarray) -> np.ndarray:
        at = rng.integers(len(tokens))
        return np.concatenate([tokens[:at], rng.integers(0, vocabulary, rng.integers(0, 4)), tokens[at + 1 :]])

    def other() -> np.ndarray:
        return edited(part_of(text)) if kin == "versions" else fresh(rng.integers(1, 50))

    text = fresh(300)
    if kin == "passages":
        passages = [fresh(rng.integers(GUARANTEED_RUN, 80)) for _ in range(4)]
        chunks = [np.concatenate([passages[i] for i in rng.integers(0, 4, rng.integers(1, 3))]) for _ in range(8)]
    elif kin == "versions":
        chunks = [edited(edited(part_of(text))) for _ in range(rng.integers(2, 30))]
    else:
        chunks = [fresh(rng.integers(GUARANTEED_RUN, 150)) for _ in range(rng.integers(1, 6))]
    kinds = {"whole": np.array, "cut": part_of, "edited": edited, "other": lambda _: other()}
    pieces = [kinds[rng.choice(list(kinds))](chunks[rng.integers(len(chunks))]) for _ in range(rng.integers(0, 6))]
    return Case(corpus_of(chunks), ids(np.concatenate([*pieces, []])))


@st.composite
def cases(draw) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocabulary = draw(st.sampled_from([1, 2, 3, 5, 1000, 50_000]))
    return make_case(rng, vocabulary, draw(st.booleans()), draw(st.sampled_from(["nothing", "passages", "versions"])))


def common_runs(prompt: np.ndarray, chunk: np.ndarray) -> Iterable[tuple[int, int]]:
    """Start and end in the prompt of every run of 31 or more tokens that is in the chunk, by brute force."""
    for shift in range(GUARANTEED_RUN - len(chunk), len(prompt) - GUARANTEED_RUN + 1):
        start, end = max(shift, 0), min(len(prompt), shift + len(chunk))
        equal = prompt[start:end] == chunk[start - shift : end - shift]
        for value, run in itertools.groupby(range(start, end), key=lambda at: equal[at - start]):
            places = list(run)
            if value and len(places) >= GUARANTEED_RUN:
                yield places[0], places[-1] + 1


@given(cases())
def test_segments_are_sound(case):
    assert_sound(match(case.corpus, case.prompt), case.corpus, case.prompt)


@given(cases())
def test_all_that_is_known_is_covered(case):
    flags = covered(match(case.corpus, case.prompt), len(case.prompt))
    flags[-1:] = True  # never part of a segment
    for chunk in case.corpus.values():
        for start, end in common_runs(case.prompt, chunk):
            assert longest_run(~flags[start:end]) < MIN_RUN


@given(cases(), st.randoms(use_true_random=False))
def test_order_of_adding_does_not_matter(case, random):
    chunks = indexed(case.corpus)
    expected = match(case.corpus, case.prompt)
    random.shuffle(chunks)
    singly = AnchorIndex()
    for chunk in chunks:
        singly.add([chunk])
        assert_sound(singly.match(case.prompt, case.corpus.get), case.corpus, case.prompt)
    assert singly.match(case.prompt, case.corpus.get) == expected
    assert len(singly) == len(chunks)


@given(cases(), st.randoms(use_true_random=False))
def test_excluded_discarded_and_never_added_are_the_same(case, random):
    out = set(random.sample(sorted(case.corpus), random.randint(0, len(case.corpus))))
    rest = {key: tokens for key, tokens in case.corpus.items() if key not in out}
    expected = match(rest, case.prompt)

    index = index_of(case.corpus)
    assert index.match(case.prompt, case.corpus.get, exclude=out) == expected
    assert index.match(case.prompt, case.corpus.get) == match(case.corpus, case.prompt)  # only for that call

    discarded = index_of(case.corpus)
    for key in out:
        discarded.discard(key)
    assert discarded.match(case.prompt, case.corpus.get) == expected
    assert len(discarded) == len(rest)


@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "batch"]), st.integers(0, 29)), max_size=60), cases())
def test_any_history_equals_a_fresh_index(history, case):
    corpus = dict(list(case.corpus.items()) + list(corpus_of(np.arange(i, i + 40) for i in range(30)).items()))
    chunks = indexed(corpus)
    index, there = AnchorIndex(), set()
    for what, number in history:
        chosen = chunks[number % len(chunks) :][:7] if what == "batch" else [chunks[number % len(chunks)]]
        if what == "discard":
            index.discard(chosen[0].key)
            there.discard(chosen[0].key)
        else:
            index.add(chosen)
            there |= {chunk.key for chunk in chosen}
    assert len(index) == len(there)
    assert {key for key in corpus if key in index} == there
    expected = match({key: tokens for key, tokens in corpus.items() if key in there}, case.prompt)
    assert index.match(case.prompt, corpus.get) == expected


@given(cases(), st.randoms(use_true_random=False))
def test_chunks_that_are_gone_are_forgotten(case, random):
    out = set(random.sample(sorted(case.corpus), random.randint(0, len(case.corpus))))
    rest = {key: tokens for key, tokens in case.corpus.items() if key not in out}
    index = index_of(case.corpus)
    segments = index.match(case.prompt, rest.get)
    assert_sound(segments, rest, case.prompt)
    # Some may be gone without having been needed; the others leave no trace.
    remembered = {key: tokens for key, tokens in case.corpus.items() if key in index}
    assert remembered.keys() >= rest.keys()
    assert segments == match(remembered, case.prompt)


def random_corpus(rng: np.random.Generator, count: int, low: int = 100, high: int = 200) -> Corpus:
    return corpus_of(rng.integers(0, 50_000, rng.integers(low, high)) for _ in range(count))


@pytest.mark.parametrize("seed", range(5))
def test_chunks_between_other_text_are_matched_exactly(seed):
    rng = np.random.default_rng(seed)
    corpus = random_corpus(rng, 300, low=GUARANTEED_RUN)
    parts, expected, position = [], [], 0
    for key in rng.permutation(list(corpus))[:40]:
        # Ids of their own, so that no run goes on into them.
        between = rng.integers(60_000, 70_000, rng.integers(1, 30))
        parts += [between, corpus[key]]
        expected.append(Segment(position + len(between), len(corpus[key]), str(key), 0))
        position = expected[-1].end
    prompt = ids(np.concatenate([*parts, [70_000]]))
    assert match(corpus, prompt) == expected


def test_a_chunk_cut_on_both_sides_and_edited_in_the_middle():
    rng = np.random.default_rng(0)
    chunk = rng.integers(0, 50_000, 300)
    (key,) = corpus = corpus_of([chunk])
    prompt = ids(np.concatenate([[9, 9], chunk[50:150], [7, 7, 7], chunk[152:290], [9, 9, 9]]))
    assert match(corpus, prompt) == [Segment(2, 100, key, 50), Segment(105, 138, key, 152)]


def test_the_same_chunk_twice():
    chunk = np.random.default_rng(1).integers(0, 50_000, 100)
    (key,) = corpus = corpus_of([chunk])
    prompt = ids(np.concatenate([chunk, chunk, [1]]))
    assert match(corpus, prompt) == [Segment(0, 100, key, 0), Segment(100, 100, key, 0)]


def test_the_longer_run_wins_where_two_overlap():
    tokens = np.random.default_rng(2).integers(0, 50_000, 200)
    long, short = tokens[:120], tokens[90:190]
    corpus = corpus_of([short, long])
    prompt = ids([*tokens, 1])
    assert match(corpus, prompt) == [Segment(0, 120, key_of(long), 0), Segment(120, 70, key_of(short), 30)]


@pytest.mark.parametrize("seed", range(5))
def test_one_chunk_rather_than_many_parts_of_it(seed):
    text = np.random.default_rng(seed).integers(0, 50_000, 300)
    corpus = corpus_of([text, *(text[i : i + 60] for i in range(0, 250, 20))])
    prompt = ids([60_000, *text, 60_000])
    assert match(corpus, prompt) == [Segment(1, 300, key_of(text), 0)]


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_which_no_passage_is_their_own(seed):
    # Each passage is in more chunks than are looked at; what joins two of them is rare and tells the right chunk.
    rng = np.random.default_rng(seed)
    passages = [rng.integers(0, 50_000, 100) for _ in range(50)]
    corpus = corpus_of(np.concatenate([passages[i] for i in rng.permutation(50)[:5]]) for _ in range(1500))
    index = index_of(corpus)
    for key in list(corpus)[:30]:
        prompt = ids([60_000, *corpus[key], 60_000])
        assert index.match(prompt, corpus.get) == [Segment(1, 500, key, 0)]


# Where only scraps are left of the runs of the best alignments, others have to fill the gaps.
@pytest.mark.parametrize("seed", [189, 553, 555, 695, 758, 922])
def test_scraps_leave_no_gaps(seed):
    case = make_case(np.random.default_rng(seed), 1000, False, "versions")
    flags = covered(match(case.corpus, case.prompt), len(case.prompt))
    flags[-1:] = True
    for chunk in case.corpus.values():
        for start, end in common_runs(case.prompt, chunk):
            assert longest_run(~flags[start:end]) < MIN_RUN


def test_ties_go_to_the_smaller_key():
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 50_000, 100)
    corpus = corpus_of(np.concatenate([shared, rng.integers(50_000, 60_000, 50)]) for _ in range(10))
    prompt = ids([60_001, *shared, 60_002])
    assert match(corpus, prompt) == [Segment(1, 100, min(corpus), 0)]


def test_a_run_shorter_than_the_minimum_is_no_segment():
    rng = np.random.default_rng(4)
    chunk = rng.integers(0, 50_000, 100)
    for length in (MIN_RUN - 1, MIN_RUN):
        # The alignment is found by the tokens after the edit; before it are ``length`` equal ones.
        prompt = ids(np.concatenate([chunk[:length], [60_000], chunk[length + 1 :], [1]]))
        starts = [segment.start for segment in match(corpus_of([chunk]), prompt)]
        assert starts == ([0, length + 1] if length == MIN_RUN else [length + 1])


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17])
def test_tiny_prompts(tokens):
    chunk = np.zeros(64, np.int32)
    corpus = corpus_of([chunk])
    (key,) = corpus
    prompt = chunk[:tokens]
    assert AnchorIndex().match(prompt, corpus.get) == []
    segments = match(corpus, prompt)
    assert_sound(segments, corpus, prompt)
    assert segments == ([Segment(0, 16, key, 0)] if tokens == 17 else [])


def test_the_last_token_is_left_to_compute():
    chunk = np.random.default_rng(5).integers(0, 50_000, GUARANTEED_RUN).astype(np.int32)
    assert match(corpus_of([chunk]), chunk) == [Segment(0, GUARANTEED_RUN - 1, key_of(chunk), 0)]


@pytest.mark.parametrize("tokens", [0, 1, 15])
def test_chunks_too_short_to_be_found_do_no_harm(tokens):
    index = AnchorIndex()
    for value in range(50):
        index.add([IndexedChunk(f"{value:032x}", sample_anchors(np.full(tokens, value, np.int32)))])
    assert len(index) == 50 and f"{7:032x}" in index
    assert index.match(np.zeros(100, np.int32), lambda key: np.zeros(tokens, np.int32)) == []


def test_keys_are_kept_to_the_last_digit():
    rng = np.random.default_rng(6)
    keys = ["0" * 32, "00" * 15 + "01", "ff" * 16, "ab" * 8 + "00" * 8, "ab" * 8 + "00" * 7 + "01"]
    corpus = {key: rng.integers(0, 50_000, 60).astype(np.int32) for key in keys}
    prompt = ids(np.concatenate([*corpus.values(), [1]]))
    assert [segment.key for segment in match(corpus, prompt)] == keys
    index = index_of(corpus)
    index.discard(keys[3])
    assert [key in index for key in keys] == [True, True, True, False, True]


@pytest.mark.parametrize("key", ["", "abc", "g" * 32, "A" * 32, "ab " * 10 + "ab", "0" * 33, "0" * 32 + "\n"])
def test_other_keys_are_refused(key):
    index = AnchorIndex()
    with pytest.raises(ValueError, match="32 lower-case hex digits"):
        index.add([IndexedChunk(key, sample_anchors(ids([])))])
    assert key not in index and len(index) == 0
    index.discard(key)
    assert 5 not in index


def test_chunks_of_the_wrong_length_are_harmless():
    # A damaged store may give other ids than were indexed.
    rng = np.random.default_rng(7)
    corpus = random_corpus(rng, 5)
    prompt = ids(np.concatenate([*corpus.values(), [1]]))
    damaged = {key: tokens[: i * 10] for i, (key, tokens) in enumerate(corpus.items())}
    for cut in (0, 70):
        assert_sound(index_of(corpus).match(prompt[cut:], damaged.get), damaged, prompt[cut:])


@pytest.fixture(scope="module")
def header() -> np.ndarray:
    return np.random.default_rng(8).integers(0, 50_000, 200)


@pytest.fixture(scope="module")
def sharing(header) -> Corpus:
    """Far more chunks than postings are looked at, with one header."""
    rng = np.random.default_rng(9)
    return corpus_of(np.concatenate([header, rng.integers(50_000, 60_000, 60)]) for _ in range(10 * MAX_POSTINGS))


def test_each_is_found_by_what_is_its_own_and_extended_over_the_header(sharing):
    index = index_of(sharing)
    for key, chunk in list(sharing.items())[::40]:
        prompt, asked = ids(np.concatenate([[60_001] * 3, chunk, [60_002]])), set()
        segments = index.match(prompt, lambda key: asked.add(key) or sharing[key])  # noqa: B023
        assert segments == [Segment(3, 260, key, 0)]
        assert asked <= {key, min(sharing)}  # the first one has the header too


def test_the_header_alone_is_covered_by_the_first_key(sharing, header):
    prompt = ids(np.concatenate([header, [60_002]]))
    assert match(sharing, prompt) == [Segment(0, 200, min(sharing), 0)]


@pytest.mark.parametrize("count", [1, MAX_POSTINGS, 5 * MAX_POSTINGS])
def test_excluding_equals_absence(sharing, header, count):
    prompt = ids(np.concatenate([header, [60_002]]))
    out = sorted(sharing)[:count]
    rest = {key: tokens for key, tokens in sharing.items() if key not in out}
    first = [Segment(0, 200, sorted(sharing)[count], 0)]
    index = index_of(sharing)
    assert index.match(prompt, sharing.get, exclude=out) == first == match(rest, prompt)
    assert index.match(prompt, rest.get) == first
    assert len(index) == len(rest)  # those gone were forgotten


@pytest.mark.parametrize("last", [0, 1, -1])
def test_postings_are_looked_at_by_key_across_tables(sharing, header, last):
    prompt = ids(np.concatenate([[60_001], header, list(sharing.values())[100], header[50:], [60_002]]))
    chunks = sorted(indexed(sharing), key=lambda chunk: chunk.key)
    index = AnchorIndex()
    index.add([chunk for chunk in chunks if chunk is not chunks[last]])
    index.add([chunks[last]])
    assert index.match(prompt, sharing.get) == match(sharing, prompt)


def test_all_gone_at_once(sharing, header, monkeypatch):
    index, asked, rounds = index_of(sharing), [], []
    lookup = AnchorIndex._postings
    monkeypatch.setattr(AnchorIndex, "_postings", lambda *args: rounds.append(1) or lookup(*args))
    prompt = ids(np.concatenate([header, [60_002]]))
    assert index.match(prompt, lambda key: asked.append(key)) == []
    assert len(index) == 0
    assert sorted(asked) == sorted(sharing)  # each once
    assert len(rounds) <= len(sharing) // MAX_POSTINGS + 1


def test_a_chunk_that_comes_and_goes_is_forgotten():
    corpus = random_corpus(np.random.default_rng(10), 1)
    (key,) = corpus
    answers = iter([None, corpus[key], corpus[key]])
    index = index_of(corpus)
    assert index.match(ids([*corpus[key], 1]), lambda _: next(answers)) == []
    assert key not in index


@pytest.mark.parametrize("period", [1, 2, 16, 17, 40])
def test_repeats_are_bounded(period):
    """Without bounds each would take minutes; the limit leaves room for a slow machine."""
    rng = np.random.default_rng(period)
    pattern = rng.integers(0, 3, period)
    lengths = [*range(31, 1500), *range(10_000, 10_020)]
    corpus = corpus_of(np.resize(np.roll(pattern, rng.integers(period)), length) for length in lengths)
    prompt = ids(np.resize(pattern, 20_000))
    index = index_of(corpus)
    began = time.perf_counter()
    segments = index.match(prompt, corpus.get)
    assert time.perf_counter() - began < 3
    assert_sound(segments, corpus, prompt)
    assert longest_run(~covered(segments, len(prompt))) < GUARANTEED_RUN


def test_work_is_linear_in_the_prompt():
    """Counted, not timed: tokens compared, for prompts and chunks that repeat a line with small changes."""

    class Counting(np.ndarray):
        compared = 0

        def __getitem__(self, item):
            part = super().__getitem__(item)
            Counting.compared += len(part)
            return part

    rng = np.random.default_rng(11)
    line = rng.integers(0, 50_000, 23)
    text = np.resize(line, 50_000)
    corpus = corpus_of([text[i : i + 40_000] for i in range(23)])
    prompt = ids(text[:20_000])
    index = index_of(corpus)
    index.match(prompt, lambda key: corpus[key].view(Counting))
    assert 0 < Counting.compared <= 2 * matching.MAX_COMPARED * len(prompt)


def test_adding_one_by_one_is_cheap():
    """Each posting is moved a logarithmic number of times, and there are logarithmically many tables."""
    rng = np.random.default_rng(12)
    chunks = indexed(random_corpus(rng, 2000, 40, 80))
    moved = 0
    merged = matching.merge_tables
    with pytest.MonkeyPatch.context() as patch:

        def counting(tables):
            nonlocal moved
            moved += sum(len(table.hashes) for table in tables)
            return merged(tables)

        patch.setattr(matching, "merge_tables", counting)
        index = AnchorIndex()
        for chunk in chunks:
            index.add([chunk])
            assert len(index._tables) <= 14
    postings = sum(len(chunk.anchors.hashes) for chunk in chunks)
    assert moved <= postings * 2 * np.log2(len(chunks))


def test_merging_block_by_block_equals_merging_at_once(monkeypatch):
    rng = np.random.default_rng(13)
    header = rng.integers(0, 50_000, 60)
    corpus = corpus_of(np.concatenate([header, rng.integers(0, 50_000, 60)]) for _ in range(100))
    chunks = indexed(corpus)

    def merged_in_two() -> AnchorIndex:
        index = AnchorIndex()
        index.add(chunks[:50])
        for chunk in chunks[:10]:
            index.discard(chunk.key)
        index.add(chunks[50:])
        return index

    at_once = merged_in_two()
    monkeypatch.setattr(postings, "_BLOCK_POSTINGS", 16)
    by_blocks = merged_in_two()
    (one,), (other,) = at_once._tables, by_blocks._tables
    assert len(at_once) == 90
    for name in ("keys", "hashes", "numbers", "offsets"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    order = np.lexsort((one.offsets, one.numbers, one.hashes))
    assert np.array_equal(order, np.arange(len(order)))


def test_large_batches_are_added_in_parts(monkeypatch):
    corpus = random_corpus(np.random.default_rng(14), 50)
    expected = index_of(corpus)
    monkeypatch.setattr(matching, "_BATCH_CHUNKS", 7)
    index = AnchorIndex()
    index.add(iter(indexed(corpus)))
    index.add(indexed(corpus))  # all there already
    assert len(index) == len(expected) == 50
    prompt = ids(np.concatenate([*list(corpus.values())[:10], [1]]))
    assert index.match(prompt, corpus.get) == expected.match(prompt, corpus.get) != []


def test_memory():
    chunks = indexed(random_corpus(np.random.default_rng(15), 300, 500, 513))
    index = AnchorIndex()
    index.add(chunks)
    assert 0 < index.nbytes <= 1100 * len(chunks)
    before = index.nbytes
    for chunk in chunks[:200]:
        index.discard(chunk.key)
    assert index.nbytes < 0.6 * before
    for chunk in chunks[200:]:
        index.discard(chunk.key)
    assert index.nbytes == len(index) == 0


def test_needs_no_torch():
    script = "import sys, cacheblend_rag.matching; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
