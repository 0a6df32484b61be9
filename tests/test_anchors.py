"""Anchor sampling: the winnowing guarantee, its density, and the stored form."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.anchors import GRAM, GUARANTEED_RUN, WINDOW, Anchors, sample_anchors


def ids(values) -> np.ndarray:
    return np.asarray(values, np.int32)


def placed(anchors: Anchors) -> set[tuple[int, int]]:
    return set(zip(anchors.hashes.tolist(), anchors.offsets.tolist(), strict=True))


def winnowed(tokens: np.ndarray) -> list[int]:
    """Where winnowing as the paper words it selects, by brute force and with all ties taken."""
    # The one k-gram of a sequence of GRAM tokens is always sampled, which gives the hash of each.
    hashes = [int(sample_anchors(tokens[i : i + GRAM]).hashes[0]) for i in range(len(tokens) - GRAM + 1)]
    windows = [hashes[i : i + WINDOW] for i in range(max(len(hashes) - WINDOW, 0) + 1)]
    return sorted({i + j for i, window in enumerate(windows) for j, h in enumerate(window) if h == min(window)})


def smallest_period(tokens: np.ndarray) -> int:
    return next(p for p in range(1, len(tokens) + 1) if (tokens[p:] == tokens[:-p]).all())


vocabularies = st.sampled_from([1, 2, 3, 5, 1000])


@st.composite
def sequences(draw, min_size=0, max_size=80):
    """Token sequences with few or many distinct tokens, some with a periodic stretch."""
    vocabulary = draw(vocabularies)
    token = st.integers(0, vocabulary - 1)
    parts = draw(st.lists(st.lists(token, min_size=1, max_size=30), max_size=4))
    repeats = [part * draw(st.sampled_from([1, 1, 2, 7])) for part in parts]
    tokens = [t for part in repeats for t in part][:max_size]
    return ids(tokens + draw(st.lists(token, min_size=min_size, max_size=min_size)))


@given(sequences(max_size=200))
def test_samples_what_winnowing_selects_but_for_repeats(tokens):
    selected = winnowed(tokens)
    sampled = sample_anchors(tokens).offsets.tolist()
    assert set(sampled) <= set(selected)
    dropped = set(selected) - set(sampled)
    grams = {i: tokens[i : i + GRAM].tobytes() for i in selected}
    for place in dropped:  # only k-grams with the same one close by on both sides
        before = [i for i in sampled if place - WINDOW - GRAM < i < place and grams[i] == grams[place]]
        after = [i for i in sampled if place < i < place + WINDOW + GRAM and grams[i] == grams[place]]
        assert before and after


@given(sequences(), sequences(), sequences(min_size=GUARANTEED_RUN), sequences(), sequences())
def test_common_run_shares_an_anchor(before_a, after_a, common, before_b, after_b):
    a = np.concatenate([before_a, common, after_a])
    b = np.concatenate([before_b, common, after_b])
    shift = len(before_b) - len(before_a)
    at_a, at_b = placed(sample_anchors(a)), placed(sample_anchors(b))
    inside_a = {(h, i) for h, i in at_a if len(before_a) <= i <= len(before_a) + len(common) - GRAM}
    aligned = {(h, i + shift) for h, i in inside_a} & at_b
    if not aligned:
        # Then it is all repeats, which no alignment can tell from another, and a hash is shared.
        assert smallest_period(common) < WINDOW
        assert {h for h, _ in at_a} & {h for h, _ in at_b}


@pytest.mark.parametrize("seed", range(10))
def test_common_run_of_31_random_tokens_shares_an_anchor(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        before, after, common = (rng.integers(0, 50_000, n) for n in (rng.integers(0, 60), 40, GUARANTEED_RUN))
        alone = placed(sample_anchors(ids(common)))
        inside = placed(sample_anchors(ids(np.concatenate([before, common, after]))))
        assert {(h, i + len(before)) for h, i in alone} <= inside


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_repeats_do_not_blow_up_the_sample(period, seed):
    tokens = ids(np.resize(np.random.default_rng(seed).integers(0, 50_000, period), 3000))
    sampled = len(sample_anchors(tokens).offsets)
    # The expected density is 2 / (WINDOW + 1). A period just above the window has few k-grams to draw from.
    assert sampled <= len(tokens) / WINDOW * (1.1 if period <= WINDOW else 5)
    assert sampled >= len(tokens) / (2 * WINDOW)


@pytest.mark.parametrize("vocabulary", [2, 10, 1000, 50_000])
def test_density_of_random_tokens(vocabulary):
    tokens = np.random.default_rng(vocabulary).integers(0, vocabulary, 100_000).astype(np.int32)
    density = len(sample_anchors(tokens).offsets) / len(tokens)
    assert density == pytest.approx(2 / (WINDOW + 1), rel=0.05)


def test_every_gap_is_at_most_a_window():
    tokens = np.random.default_rng(0).integers(0, 50_000, 50_000).astype(np.int32)
    offsets = sample_anchors(tokens).offsets
    assert offsets[0] < WINDOW
    assert np.diff(offsets).max() <= WINDOW
    assert len(tokens) - GRAM - offsets[-1] < WINDOW


def test_hashes_of_low_ids_do_not_collide():
    rng = np.random.default_rng(1)
    grams = {tuple(row) for row in rng.integers(0, 2, (20_000, GRAM)).tolist()}
    grams |= {tuple(int(i == j) * n for j in range(GRAM)) for i in range(GRAM) for n in range(200)}
    hashes = {int(sample_anchors(ids(gram)).hashes[0]) for gram in grams}
    assert len(hashes) == len(grams)


def test_hashes_depend_on_the_order_of_tokens():
    rng = np.random.default_rng(2)
    gram = rng.integers(0, 50_000, GRAM)
    hashes = {int(sample_anchors(ids(rng.permutation(gram))).hashes[0]) for _ in range(500)}
    assert len(hashes) == 500


def test_hash_bits_are_balanced():
    tokens = np.arange(20_000, dtype=np.int32)  # as far from random as ids get
    hashes = np.array([int(sample_anchors(tokens[i : i + GRAM]).hashes[0]) for i in range(4000)], np.uint64)
    ones = (hashes[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.05


@given(st.integers(0, GRAM - 1))
def test_too_short_for_a_kgram(length):
    anchors = sample_anchors(ids(range(length)))
    assert len(anchors.hashes) == len(anchors.offsets) == 0


@given(st.integers(GRAM, GUARANTEED_RUN - 1))
def test_short_sequence_has_an_anchor(length):
    assert len(sample_anchors(ids(range(length))).offsets) == 1


@given(sequences(max_size=200))
def test_bytes_round_trip(tokens):
    anchors = sample_anchors(tokens)
    again = Anchors.from_bytes(anchors.to_bytes())
    assert len(anchors.to_bytes()) == 12 * len(anchors.offsets)
    assert again.hashes.dtype == np.uint64 and again.offsets.dtype == np.int32
    assert np.array_equal(anchors.hashes, again.hashes) and np.array_equal(anchors.offsets, again.offsets)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x"])
def test_damaged_bytes_are_refused(change):
    with pytest.raises(ValueError, match="damaged"):
        Anchors.from_bytes(change(sample_anchors(ids(range(100))).to_bytes()))


def test_ids_of_any_memory_layout():
    tokens = np.random.default_rng(3).integers(-5, 50_000, (200, 2)).astype(np.int32)
    assert placed(sample_anchors(tokens[:, 0])) == placed(sample_anchors(tokens[:, 0].copy()))


def test_stored_form_is_fixed():
    # Stores hold anchors: if this fails, anchors already stored no longer match any prompt.
    stored = sample_anchors(ids(range(1000, 1060))).to_bytes()
    hashes, offsets = stored[:40].hex(), stored[40:].hex()
    assert hashes == "69e6d689e7da4805f3d94387bc658b1885a0afcf40efb219b3b7d3d42096a3310676bcd1bb799430"
    assert offsets == "0b0000000e000000100000001c00000027000000"


def test_other_processes_sample_the_same():
    script = (
        "import numpy as np; from cacheblend_rag.anchors import sample_anchors;"
        "print(sample_anchors(np.arange(500, dtype=np.int32)).to_bytes().hex())"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == sample_anchors(ids(range(500))).to_bytes().hex()
