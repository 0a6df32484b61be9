"""Finding known chunks in a prompt's token ids by content: no separators, wherever they stand, cut short or edited."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from cacheblend_rag.anchors import GRAM, Anchors, Hashes, sample_anchors
from cacheblend_rag.postings import (
    MAX_POSTINGS,
    Flags,
    Indices,
    Postings,
    PostingTable,
    expand_ranges,
    merge_tables,
    pack_keys,
    places_in_groups,
    unpack_keys,
)

if TYPE_CHECKING:
    from cacheblend_rag.chunks import TokenIds
    from cacheblend_rag.store.base import IndexedChunk

MIN_RUN = GRAM
"""Shortest segment, in tokens. A shorter run holds no anchor, so it would be found by luck only; it is a common phrase
rather than a part of a chunk; and its edges, which are recomputed anyway, are most of it."""

MAX_COMPARED = 128
"""Most chunk tokens compared for each prompt token. Usually about one is; prompts and chunks that repeat a few lines
over and over would otherwise need as many as there are repeats."""

_COMPARE_OVERHEAD = 256  # tokens that could be compared in the time it takes to set about it
_BATCH_CHUNKS = 1 << 16

_Run = tuple[int, str, int, int]
"""Equal tokens of a chunk and the prompt: minus their number, key, first place in the chunk, and in the prompt. The
smaller one is taken first."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of prompt tokens that equals a run of a known chunk's tokens.

    Attributes:
        start: First position in the prompt.
        length: Tokens in the run.
        key: The chunk's key.
        offset: First token within the chunk.
    """

    start: int
    length: int
    key: str
    offset: int

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length

    def since(self, position: int) -> Segment:
        """The part of the run from a position on, which must be before its end."""
        cut = max(0, position - self.start)
        return Segment(self.start + cut, self.length - cut, self.key, self.offset + cut)


class AnchorIndex:
    """Which chunks have which anchors. Not safe for use by several threads at once.

    Postings (hash, chunk, offset) lie in sorted tables, 16 bytes each, about 60 for a chunk of 512 tokens. New chunks
    make a new table, which is merged with the one before it until each table is at least twice as large as the next (a
    log-structured merge tree): lookups search few tables, and adding is cheap whether chunks come singly or at once.
    """

    def __init__(self) -> None:
        self._tables: list[PostingTable] = []

    def add(self, chunks: Iterable[IndexedChunk]) -> None:
        """Add chunks; those already there are skipped.

        Raises:
            ValueError: a key is not 32 lower-case hex digits.
        """
        chunks = iter(chunks)
        while batch := {chunk.key: chunk.anchors for chunk in itertools.islice(chunks, _BATCH_CHUNKS)}:
            keys = pack_keys(batch)
            new = np.ones(len(keys), np.bool_)
            for table in self._tables:
                new &= ~table.find(keys)[1]
            if new.any():
                self._push(PostingTable.build(keys[new], list(itertools.compress(batch.values(), new))))

    def _push(self, table: PostingTable) -> None:
        tables = list(self._tables)
        while tables and tables[-1].size < 2 * table.size:
            table = merge_tables([tables.pop(), table])
        self._tables = [*tables, table]

    def discard(self, key: str) -> None:
        """Forget a chunk; does nothing if it isn't there."""
        for i, table in enumerate(self._tables):
            number = table.number(key)
            if number is not None:
                table.alive[number] = False
                living = np.count_nonzero(table.alive)
                if 2 * living < len(table.alive):
                    self._tables[i : i + 1] = [merge_tables([table])] if living else []
                return

    def __len__(self) -> int:
        return sum(int(np.count_nonzero(table.alive)) for table in self._tables)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and any(table.number(key) is not None for table in self._tables)

    @property
    def nbytes(self) -> int:
        """Bytes of memory the tables hold."""
        return sum(table.nbytes for table in self._tables)

    def match(
        self,
        prompt_ids: TokenIds,
        chunk_ids: Callable[[str], TokenIds | None],
        exclude: Collection[str] = (),
    ) -> list[Segment]:
        """Find runs of known chunks in a prompt.

        Each anchor of the prompt speaks for the alignments (chunk, shift) at which a known chunk has the same k-gram:
        the louder, the rarer the k-gram is. The best alignment of each anchor is compared token by token, and of the
        equal runs the longest are taken first, the others for what those leave uncovered. Where anchors stay uncovered
        because only scraps of their runs were left, their other alignments fill the gaps. Ties are broken by key and
        offset, so that the result depends on the set of chunks and not on how they came in.

        Any 31 or more tokens (``GUARANTEED_RUN``) in a row that are also in a known chunk are covered, but for pieces
        shorter than ``MIN_RUN``. Where a k-gram occurs more than ``MAX_POSTINGS`` times, the chunk that covers it need
        not be the one that would have fitted best, and pieces up to twice as long may be left.

        Args:
            prompt_ids: The prompt's token ids, int32 ``[tokens]``.
            chunk_ids: Gives a chunk's token ids (int32 ``[tokens]``), or None if the chunk is gone: then it is
                forgotten, and the prompt matched again without it. Asked for chunks that may be in the prompt only.
            exclude: Keys of chunks to be treated as not there.

        Returns:
            Disjoint segments of at least ``MIN_RUN`` tokens, by start. The last token of the prompt is in none of them:
            it has to be computed for its logits.
        """
        prompt_ids = np.asarray(prompt_ids, np.int32)
        anchors = sample_anchors(prompt_ids)
        known_ids = functools.cache(chunk_ids)
        while self._tables:
            postings = self._postings(anchors.hashes, exclude)
            if postings is None:
                break
            try:
                return _cover(prompt_ids[:-1], _Votes(anchors, postings), known_ids)
            except _ChunkGoneError:
                # Chunks often go many at a time: look at all that came up rather than meet them one a round.
                for key in unpack_keys(postings.keys):
                    if known_ids(key) is None:
                        self.discard(key)
        return []

    def _postings(self, hashes: Hashes, exclude: Collection[str]) -> Postings | None:
        """The first ``MAX_POSTINGS`` occurrences, by key and offset, of each hash in any table; None: there is none."""
        wanted, group_of = np.unique(hashes, return_inverse=True)
        found = [table.postings(wanted, table.alive_without(exclude)) for table in self._tables]
        if not any(len(groups) for groups, _, _ in found):
            return None
        used_keys, places, count = [], [], 0
        for table, (_, numbers, _) in zip(self._tables, found, strict=True):
            # By the table's own numbers first: they are faster to sort than keys, of which few are left then.
            used, places_in_used = np.unique(numbers, return_inverse=True)
            used_keys.append(table.keys[used])
            places.append(count + places_in_used)
            count += len(used)
        keys, number_of = np.unique(np.concatenate(used_keys), return_inverse=True)
        chunks = number_of[np.concatenate(places)]
        groups, offsets = (np.concatenate([columns[i] for columns in found]) for i in (0, 2))
        # All of a chunk's postings come from one table, and in order: sorted stably they stay so, and quickly.
        order = np.argsort(groups * len(keys) + chunks, kind="stable")
        order = order[places_in_groups(groups[order]) < MAX_POSTINGS]
        counts = np.bincount(groups[order], minlength=len(wanted))
        return Postings(keys, chunks[order], offsets[order], (np.cumsum(counts) - counts)[group_of], counts[group_of])


class _ChunkGoneError(Exception):
    """A chunk in the index has no token ids any more."""


class _Votes:
    """Which alignments the anchors of a prompt speak for. Alignments are numbered from the best one.

    An alignment lays a chunk against the prompt: its token ``i`` at position ``shift + i``. It is the better, the more
    anchors speak for it and the rarer those are; ties go by key, then to what has the prompt earlier in the chunk.

    Attributes:
        places: Position of each anchor in the prompt, int32 ``[anchors]``.
        anchors: Who votes, ascending, int64 ``[votes]``.
        alignments: For what, int64 ``[votes]``.
    """

    def __init__(self, anchors: Anchors, postings: Postings) -> None:
        self.places = anchors.offsets
        self.anchors, posting = expand_ranges(postings.starts, postings.counts)
        chunks, offsets = postings.chunks[posting], postings.offsets[posting]
        shifts = self.places[self.anchors] - offsets
        self._highest = int(shifts.max(initial=0))
        self._shifts = self._highest - int(shifts.min(initial=0)) + 1
        # Chunk and shift, high shifts first, in one integer that sorts as the two would.
        codes, code_of = np.unique(chunks * self._shifts + (self._highest - shifts), return_inverse=True)
        scores = np.bincount(code_of, weights=MAX_POSTINGS // postings.counts[self.anchors], minlength=len(codes))
        best_first = np.argsort(-scores, kind="stable")
        self._codes = codes[best_first]
        self._keys = postings.keys
        numbers = np.empty_like(best_first)
        numbers[best_first] = np.arange(len(best_first))
        self.alignments = numbers[code_of]

    def best(self) -> Indices:
        """The alignments that are the best of some anchor, ascending.

        They cover the k-grams of all anchors that have any, and are at most as many as anchors, however many alignments
        there are.
        """
        first_votes = np.flatnonzero(np.diff(self.anchors, prepend=-1))
        return self._ascending(np.minimum.reduceat(self.alignments, first_votes))

    def others_touching(self, flags: Flags, best: Indices) -> Indices:
        """The alignments, but for the best ones, of all anchors whose k-gram has a flagged token, ascending."""
        before = np.concatenate([[0], np.cumsum(flags)])
        touching = before[np.minimum(self.places + GRAM, len(flags))] > before[self.places]
        return self._ascending(self.alignments[touching[self.anchors]], best)

    def _ascending(self, alignments: Indices, without: Indices | None = None) -> Indices:
        chosen = np.zeros(len(self._codes), np.bool_)
        chosen[alignments] = True
        if without is not None:
            chosen[without] = False
        return np.flatnonzero(chosen)

    def chunk_and_shift(self, alignments: Indices) -> list[tuple[str, int]]:
        """Key and shift of alignments."""
        chunks, below_highest = np.divmod(self._codes[alignments], self._shifts)
        return list(zip(unpack_keys(self._keys[chunks]), (self._highest - below_highest).tolist(), strict=True))


def _cover(prompt_ids: TokenIds, votes: _Votes, chunk_ids: Callable[[str], TokenIds | None]) -> list[Segment]:
    """Segments by start, see :meth:`AnchorIndex.match`.

    Raises:
        _ChunkGoneError: a chunk that is needed has no ids.
    """
    free = np.ones(len(prompt_ids), np.bool_)
    best = votes.best()
    segments = _take(_equal_runs(prompt_ids, votes.chunk_and_shift(best), chunk_ids), free)
    gaps = np.zeros_like(free)
    for start, end in _long_runs(free):
        gaps[start:end] = True
    others = votes.others_touching(gaps, best)
    segments += _take(_equal_runs(prompt_ids, votes.chunk_and_shift(others), chunk_ids), free)
    return sorted(segments, key=lambda segment: segment.start)


def _equal_runs(
    prompt_ids: TokenIds, alignments: Iterable[tuple[str, int]], chunk_ids: Callable[[str], TokenIds | None]
) -> Iterator[_Run]:
    """Runs of at least ``MIN_RUN`` equal tokens on the alignments, best first, as far as ``MAX_COMPARED`` allows."""
    budget = MAX_COMPARED * len(prompt_ids)
    for key, shift in alignments:
        tokens = chunk_ids(key)
        if tokens is None:
            raise _ChunkGoneError(key)
        start = max(shift, 0)
        end = max(start, min(shift + len(tokens), len(prompt_ids)))
        budget -= max(end - start, _COMPARE_OVERHEAD)
        if budget < 0:
            return
        equal = prompt_ids[start:end] == tokens[start - shift : end - shift]
        for first, last in _long_runs(equal):
            yield first - last, key, start + first - shift, start + first


def _take(runs: Iterable[_Run], free: Flags) -> list[Segment]:
    """The longest run on free positions, the longest of what that leaves of the others, and so on; marks them taken."""
    heap = list(runs)
    heapq.heapify(heap)
    taken = []
    while heap:
        minus_length, key, offset, start = heapq.heappop(heap)
        end = start - minus_length
        if free[start:end].all():
            free[start:end] = False
            taken.append(Segment(start, end - start, key, offset))
        else:
            for first, last in _long_runs(free[start:end]):
                heapq.heappush(heap, (first - last, key, offset + first, start + first))
    return taken


def _long_runs(flags: Flags) -> list[tuple[int, int]]:
    """Start and end of each run of at least ``MIN_RUN`` True values."""
    if len(flags) >= MIN_RUN and flags.all():  # in haste: most chunks are met whole
        return [(0, len(flags))]
    padded = np.zeros(len(flags) + 2, np.bool_)
    padded[1:-1] = flags
    edges = np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)
    return [(first, last) for first, last in edges.tolist() if last - first >= MIN_RUN]
