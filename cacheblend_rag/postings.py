"""Where sampled k-grams occur in known chunks: compact sorted tables, merged as they grow."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cacheblend_rag.anchors import Anchors, Hashes

MAX_POSTINGS = 64
"""Most occurrences looked at of one k-gram, so that a header shared by a whole corpus costs no more in a larger corpus.
Chunks are found by what is theirs alone all the same, and then extend over what they share."""

_BLOCK_POSTINGS = 1 << 20
_KEY = re.compile("[0-9a-f]{32}")

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
PackedKeys = npt.NDArray[np.bytes_]  # S16: the raw bytes of each key, which sort as its hex digits do


class PostingTable:
    """Postings of a fixed set of chunks, sorted by hash, chunk and offset. Chunks are numbered in the order of keys.

    Attributes:
        keys: Ascending, S16 ``[chunks]``.
        alive: False for chunks that were discarded, bool ``[chunks]``.
        hashes: uint64 ``[postings]``.
        numbers: The chunk of each posting, uint32 ``[postings]``.
        offsets: First token of the k-gram within the chunk, uint32 ``[postings]``.
    """

    def __init__(
        self,
        keys: PackedKeys,
        hashes: Hashes,
        numbers: npt.NDArray[np.uint32],
        offsets: npt.NDArray[np.uint32],
    ) -> None:
        self.keys = keys
        self.alive = np.ones(len(keys), np.bool_)
        self.hashes = hashes
        self.numbers = numbers
        self.offsets = offsets

    @classmethod
    def build(cls, keys: PackedKeys, anchors: Sequence[Anchors]) -> PostingTable:
        """A table of the given chunks, at least one, in any order."""
        by_key = np.argsort(keys)
        sorted_anchors = [anchors[i] for i in by_key]
        hashes = np.concatenate([a.hashes for a in sorted_anchors])
        numbers = np.repeat(np.arange(len(keys), dtype=np.uint32), [len(a.hashes) for a in sorted_anchors])
        offsets = np.concatenate([a.offsets for a in sorted_anchors]).astype(np.uint32)
        by_hash = np.argsort(hashes, kind="stable")
        return cls(keys[by_key], hashes[by_hash], numbers[by_hash], offsets[by_hash])

    @property
    def size(self) -> int:
        """What merging this table costs."""
        return len(self.keys) + len(self.hashes)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(a.nbytes for a in (self.keys, self.alive, self.hashes, self.numbers, self.offsets))

    def find(self, keys: PackedKeys) -> tuple[Indices, Flags]:
        """Number of each key, and whether it is here and alive (if not, the number means nothing)."""
        numbers = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return numbers, (self.keys[numbers] == keys) & self.alive[numbers]

    def number(self, key: str) -> int | None:
        """Number of a chunk, None if it is not here or discarded."""
        if not _KEY.fullmatch(key):
            return None
        numbers, found = self.find(pack_keys([key]))
        return int(numbers[0]) if found[0] else None

    def alive_without(self, exclude: Collection[str]) -> Flags:
        """Which chunks are alive and not excluded."""
        numbers = [number for number in map(self.number, exclude) if number is not None]
        if not numbers:
            return self.alive
        alive = self.alive.copy()
        alive[numbers] = False
        return alive

    def postings(self, hashes: Hashes, alive: Flags) -> tuple[Indices, Indices, Indices]:
        """At least the first ``MAX_POSTINGS`` postings of each hash that are alive.

        Args:
            hashes: Ascending, uint64 ``[n]``.
            alive: Which chunks count, bool ``[chunks]``.

        Returns:
            Which of the hashes, chunk number and offset of each posting.
        """
        start = np.searchsorted(self.hashes, hashes, "left")
        end = np.searchsorted(self.hashes, hashes, "right")
        looked = np.minimum(start + MAX_POSTINGS, end)
        while True:
            groups, at = expand_ranges(start, looked - start)
            living = alive[self.numbers[at]]
            groups, at = groups[living], at[living]
            short = (np.bincount(groups, minlength=len(hashes)) < MAX_POSTINGS) & (looked < end)
            if not short.any():
                return groups, self.numbers[at].astype(np.int64), self.offsets[at].astype(np.int64)
            looked = np.where(short, np.minimum(2 * looked - start, end), looked)


def merge_tables(tables: Sequence[PostingTable]) -> PostingTable:
    """One table of the living chunks of one or more tables, of which there is at least one.

    Works through the hashes block by block, so that little memory is needed beside the old tables and the new one.
    """
    keys = np.concatenate([table.keys[table.alive] for table in tables])
    by_key = np.argsort(keys)
    new_numbers = np.empty(len(keys), np.uint32)
    new_numbers[by_key] = np.arange(len(keys), dtype=np.uint32)
    renumbered = []
    for table in tables:
        numbers = np.zeros(len(table.keys), np.uint32)
        count = np.count_nonzero(table.alive)
        numbers[table.alive], new_numbers = new_numbers[:count], new_numbers[count:]
        renumbered.append(numbers)

    total = sum(np.count_nonzero(table.alive[table.numbers]) for table in tables)
    merged = PostingTable(
        keys[by_key], np.empty(total, np.uint64), np.empty(total, np.uint32), np.empty(total, np.uint32)
    )
    largest = max(tables, key=lambda table: table.size)
    cuts = largest.hashes[_BLOCK_POSTINGS::_BLOCK_POSTINGS]
    bounds = [[0, *np.searchsorted(table.hashes, cuts), len(table.hashes)] for table in tables]
    filled = 0
    for block in range(len(cuts) + 1):
        parts = []
        for table, new, bound in zip(tables, renumbered, bounds, strict=True):
            part = slice(bound[block], bound[block + 1])
            numbers, living = table.numbers[part], table.alive[table.numbers[part]]
            parts.append((table.hashes[part][living], new[numbers[living]], table.offsets[part][living]))
        hashes, numbers, offsets = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = _merge_order(hashes, numbers)
        filled_to = filled + len(order)
        merged.hashes[filled:filled_to] = hashes[order]
        merged.numbers[filled:filled_to] = numbers[order]
        merged.offsets[filled:filled_to] = offsets[order]
        filled = filled_to
    return merged


def _merge_order(hashes: Hashes, numbers: npt.NDArray[np.uint32]) -> Indices:
    """Order by hash and number of a few sequences that are ordered so, laid end to end. Stable."""
    # A stable sort recognises ordered sequences and merges them in linear time, but only by one column. So that is the
    # hash, and the few hashes that occur several times are put right afterwards.
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    several = np.flatnonzero(np.append(same, False) | np.append(False, same))
    unordered = order[several]
    order[several] = unordered[np.lexsort((numbers[unordered], hashes[unordered]))]
    return order


class Postings(NamedTuple):
    """Where the k-grams at the anchors of a prompt occur: slices of postings sorted by chunk and offset.

    Attributes:
        keys: Chunks, ascending, S16 ``[chunks]``.
        chunks: The chunk of each posting, as an index into ``keys``, int64 ``[postings]``.
        offsets: First token of the k-gram within the chunk, int64 ``[postings]``.
        starts: First posting of each anchor, int64 ``[anchors]``.
        counts: Number of postings of each anchor, int64 ``[anchors]``.
    """

    keys: PackedKeys
    chunks: Indices
    offsets: Indices
    starts: Indices
    counts: Indices


def expand_ranges(starts: Indices, counts: Indices) -> tuple[Indices, Indices]:
    """The integers ``starts[i], ..., starts[i] + counts[i] - 1`` for each i one after another, and the i of each."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) + (starts - np.cumsum(counts) + counts)[owners]


def places_in_groups(groups: Indices) -> Indices:
    """How many equal values precede each one in an ascending array."""
    counts = np.bincount(groups)
    return np.arange(len(groups)) - (np.cumsum(counts) - counts)[groups]


def pack_keys(keys: Iterable[str]) -> PackedKeys:
    """Keys as raw bytes.

    Raises:
        ValueError: one is not 32 lower-case hex digits.
    """
    keys = list(keys)
    for key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a chunk's key is 32 lower-case hex digits, not {key!r}")
    return np.frombuffer(bytes.fromhex("".join(keys)), "S16")


def unpack_keys(keys: PackedKeys) -> list[str]:
    """Inverse of :func:`pack_keys`."""
    # Not keys.tolist(), which drops zero bytes at the end.
    digits = keys.tobytes().hex()
    return [digits[i : i + 32] for i in range(0, len(digits), 32)]
