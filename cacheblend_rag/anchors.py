"""Sampling k-grams of token ids by their content, so that equal texts yield equal samples wherever they stand."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from cacheblend_rag.chunks import TokenIds

# Stored anchors depend on these two, and on the constants in _kgram_hashes and _mix: changing any of them orphans every
# stored anchor.
GRAM = 16
"""Tokens in a k-gram."""
WINDOW = 16
"""Consecutive k-grams of which at least one is sampled."""
GUARANTEED_RUN = GRAM + WINDOW - 1
"""Two sequences that have this many tokens in a row in common share an anchor."""

Hashes = npt.NDArray[np.uint64]

_RECORD_BYTES = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Anchors:
    """The sampled k-grams of one token sequence, in order.

    Attributes:
        hashes: Hash of each k-gram, uint64 ``[n]``.
        offsets: Where each starts in the sequence, in tokens, ascending, int32 ``[n]``.
    """

    hashes: Hashes
    offsets: npt.NDArray[np.int32]

    def to_bytes(self) -> bytes:
        """Little-endian hashes followed by little-endian offsets: 12 bytes an anchor, the same on every machine."""
        return self.hashes.astype("<u8").tobytes() + self.offsets.astype("<i4").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Anchors:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: the length is not that of whole anchors.
        """
        count, rest = divmod(len(data), _RECORD_BYTES)
        if rest:
            raise ValueError(f"stored anchors are damaged: {len(data)} bytes is not a multiple of {_RECORD_BYTES}")
        hashes = np.frombuffer(data, "<u8", count).astype(np.uint64)
        return cls(hashes, np.frombuffer(data, "<i4", count, offset=8 * count).astype(np.int32))


def sample_anchors(ids: TokenIds) -> Anchors:
    """Sample k-grams by winnowing (Schleimer, Wilkerson, Aiken: Winnowing, SIGMOD 2003).

    A k-gram is sampled if its hash is the smallest of some ``WINDOW`` consecutive ones: 2 in 17 for ordinary text. What
    is sampled depends only on the tokens around it, so two sequences that have ``GUARANTEED_RUN`` (31) tokens in a row
    in common share an anchor at the same place within them.

    Equal smallest hashes in one window mean text that repeats itself with a period below ``WINDOW``. Sampling all of
    them would sample every token of a long repeat; of each such repeat the first and the last are sampled, and one per
    ``WINDOW`` tokens between. What stands before or after the repeat is aligned by its first or last anchor. A common
    run that is nothing but repeats still shares a hash, at places that may differ by some periods.

    A sequence of ``GRAM`` to 30 tokens has its smallest k-gram sampled, which a longer text around the same tokens need
    not have in its sample: so short a chunk is found often, not always. A sequence below ``GRAM`` tokens has no anchor
    and is never found.

    Args:
        ids: Token ids, int32 ``[tokens]``.

    Returns:
        The anchors, in order.
    """
    hashes = _kgram_hashes(ids)
    if not len(hashes):
        return Anchors(hashes, np.zeros(0, np.int32))
    window = min(WINDOW, len(hashes))
    # The smallest hash of each window, then for each k-gram the largest of these over the windows it is in: if its own
    # equals that, it is the smallest of one of them. Zeros stand for windows that don't exist.
    smallest = _sliding(np.minimum, hashes, window)
    outside = np.zeros(window - 1, np.uint64)
    largest = _sliding(np.maximum, np.concatenate([outside, smallest, outside]), window)
    places = np.flatnonzero(hashes == largest)
    places = places[_thinned_repeats(hashes[places], places)]
    return Anchors(hashes[places], places.astype(np.int32))


def _thinned_repeats(hashes: Hashes, places: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of the smallest k-grams to sample: all, but of chains of equal ones only the ends and one per window."""
    breaks = (hashes[1:] != hashes[:-1]) | (places[1:] - places[:-1] >= WINDOW)
    first = np.concatenate([[True], breaks])
    last = np.concatenate([breaks, [True]])
    chain_start = places[first][np.cumsum(first) - 1]
    stride = (places - chain_start) // WINDOW
    keep: npt.NDArray[np.bool_] = first | last
    keep[1:] |= stride[1:] != stride[:-1]
    return keep


def _kgram_hashes(ids: TokenIds) -> Hashes:
    """Hashes of all k-grams, uint64 ``[tokens - GRAM + 1]``, or ``[0]``: pairs of tokens, pairs of pairs, and so on."""
    if len(ids) < GRAM:
        return np.zeros(0, np.uint64)
    hashes = np.asarray(ids, np.int32).view(np.uint32).astype(np.uint64)
    other = np.empty_like(hashes)  # two arrays in turn: making new ones takes as long as filling them
    _mix(hashes, other)
    span = 1
    while span < GRAM:
        size = len(hashes) - span
        pairs = np.multiply(hashes[:size], np.uint64(0x9E3779B97F4A7C15), out=other[:size])
        pairs += hashes[span:]
        hashes, other = pairs, hashes[:size]
        _mix(hashes, other)
        span *= 2
    return hashes


def _mix(x: Hashes, shifted: Hashes) -> None:
    """The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), in place.

    Args:
        x: What to mix.
        shifted: As large; overwritten.
    """
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= np.right_shift(x, np.uint64(30), out=shifted)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)


def _sliding(smaller_or_larger: np.ufunc, values: Hashes, width: int) -> Hashes:
    """Minimum or maximum of each ``width`` consecutive values, by doubling the width."""
    span = 1
    while span < width:
        step = min(span, width - span)
        values = smaller_or_larger(values[:-step], values[step:])
        span += step
    return values
