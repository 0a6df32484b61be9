"""Times matching prompts with known chunks, and says what the index takes.

    python benchmarks/matching.py [--chunks 10000] [--tokens 10000] [--repeats 100] [--json FILE]

Chunks are random token ids, and then hostile ones: headers and passages shared by many, versions of one text, texts
that repeat themselves. Above 100,000 chunks only one row is measured, with made-up anchors.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from cacheblend_rag.anchors import Anchors, sample_anchors
from cacheblend_rag.matching import AnchorIndex
from cacheblend_rag.store.base import IndexedChunk

VOCABULARY = 50_000
MADE_UP_FROM = 100_000


@dataclasses.dataclass
class Row:
    """One line of the report.

    Attributes:
        case: What the chunks and prompts are.
        chunks: How many chunks are in the index.
        median_ms: Median time to match a prompt.
        p99_ms: 99th percentile of it.
        covered: Share of the prompts' tokens that were matched.
        add_ms: Time to add a chunk, without sampling it (for made-up anchors, with making them up).
        chunk_bytes: Memory of the index for each chunk.
    """

    case: str
    chunks: int
    median_ms: float
    p99_ms: float
    covered: float
    add_ms: float
    chunk_bytes: float


class Corpora:
    """Random chunks and prompts of several kinds, int32 arrays."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.headers = [self.tokens(450, 450) for _ in range(20)]
        self.passages = [self.tokens(90, 110) for _ in range(50)]
        self.patterns = [self.tokens(n, n) for n in range(1, 41)]
        self.text = self.tokens(5_000, 5_000)

    def tokens(self, low: int, high: int) -> np.ndarray:
        """From low to high (inclusive) random tokens."""
        return self.rng.integers(0, VOCABULARY, self.rng.integers(low, high + 1)).astype(np.int32)

    def pick(self, values: list[np.ndarray]) -> np.ndarray:
        """One of them."""
        return values[self.rng.integers(len(values))]

    def unlike_others(self) -> np.ndarray:
        """A chunk like no other."""
        return self.tokens(300, 512)

    def with_header(self) -> np.ndarray:
        """A chunk that begins as a twentieth of all chunks do, with few tokens of its own."""
        return np.concatenate([self.pick(self.headers), self.tokens(20, 62)])

    def of_passages(self) -> np.ndarray:
        """A chunk of which no passage is its own."""
        return np.concatenate([self.pick(self.passages) for _ in range(5)])

    def version(self) -> np.ndarray:
        """A part of the one text, with some words changed."""
        start = self.rng.integers(len(self.text) - 512)
        part = self.text[start : start + self.rng.integers(300, 513)].copy()
        part[self.rng.integers(0, len(part), 5)] = self.tokens(5, 5)
        return part

    def repeats(self, low: int = 31, high: int = 512) -> np.ndarray:
        """A chunk that repeats one of 40 patterns of 1 to 40 tokens."""
        pattern = np.roll(self.pick(self.patterns), self.rng.integers(40))
        return np.resize(pattern, self.rng.integers(low, high + 1))

    def long_repeats(self) -> np.ndarray:
        """Such a chunk of thousands of tokens."""
        return self.repeats(5_000, 10_000)

    def prompt(self, corpus: list[np.ndarray], tokens: int) -> np.ndarray:
        """Chunks in random order, each after a line of its own, and a question at the end."""
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < tokens:
            parts += [self.tokens(5, 40), self.pick(corpus)]
        return np.concatenate([np.concatenate(parts)[: tokens - 30], self.tokens(30, 30)])


def key_of(chunk: np.ndarray) -> str:
    """A key as the store would make one."""
    return hashlib.blake2b(chunk.tobytes(), digest_size=16).hexdigest()


def indexed(corpus: dict[str, np.ndarray]) -> Iterator[IndexedChunk]:
    """Chunks with their anchors."""
    for key, chunk in corpus.items():
        yield IndexedChunk(key, sample_anchors(chunk))


def made_up(rng: np.random.Generator, count: int) -> Iterator[IndexedChunk]:
    """Chunks of 512 tokens that don't exist, with as many anchors as such chunks have."""
    offsets = np.linspace(0, 496, 59, dtype=np.int32)
    for _ in range(count):
        hashes = rng.integers(0, 2**64, len(offsets), np.uint64)
        yield IndexedChunk(rng.bytes(16).hex(), Anchors(hashes, offsets))


def filled(batches: Iterable[Iterable[IndexedChunk]]) -> tuple[AnchorIndex, float]:
    """An index, and the seconds that adding took."""
    index, seconds = AnchorIndex(), 0.0
    for batch in batches:
        began = time.perf_counter()
        index.add(batch)
        seconds += time.perf_counter() - began
    return index, seconds


def measure(
    case: str,
    index: AnchorIndex,
    add_seconds: float,
    corpus: dict[str, np.ndarray],
    prompt: Callable[[], np.ndarray],
    repeats: int,
) -> Row:
    """Match random prompts."""
    times, covered, tokens = [], 0, 0
    for _ in range(repeats):
        ids = prompt()
        began = time.perf_counter()
        segments = index.match(ids, corpus.get)
        times.append(1000 * (time.perf_counter() - began))
        covered += sum(segment.length for segment in segments)
        tokens += len(ids)
    return Row(
        case=case,
        chunks=len(index),
        median_ms=float(np.median(times)),
        p99_ms=float(np.quantile(times, 0.99)),
        covered=covered / tokens,
        add_ms=1000 * add_seconds / len(index),
        chunk_bytes=index.nbytes / len(index),
    )


def rows(chunks: int, tokens: int, repeats: int) -> Iterator[Row]:
    """Measure everything that such an index is good for."""
    source = Corpora(seed=0)
    if chunks > MADE_UP_FROM:
        real = [source.unlike_others() for _ in range(1000)]
        corpus = {key_of(chunk): chunk for chunk in real}
        index, seconds = filled([indexed(corpus), made_up(source.rng, chunks - len(corpus))])
        yield measure("made-up anchors", index, seconds, corpus, lambda: source.prompt(real, tokens), repeats)
        return
    for make, count, singly in [
        (source.unlike_others, chunks, False),
        (source.unlike_others, chunks, True),
        (source.with_header, chunks, False),
        (source.of_passages, chunks, False),
        (source.version, chunks, False),
        (source.repeats, chunks, False),
        (source.long_repeats, chunks // 25, False),
    ]:
        corpus = {key_of(chunk): chunk for chunk in (make() for _ in range(count))}
        batch, values = list(indexed(corpus)), list(corpus.values())
        index, seconds = filled([[chunk] for chunk in batch] if singly else [batch])
        case = make.__name__.replace("_", " ") + (", added singly" if singly else "")
        yield measure(case, index, seconds, corpus, lambda values=values: source.prompt(values, tokens), repeats)
        if "repeats" in case:
            for period in (1, 2, 16, 17, 40):
                pattern = np.resize(source.patterns[period - 1], tokens)
                yield measure(f"{case}; prompt too, period {period}", index, seconds, corpus, pattern.copy, repeats)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=10_000, help="chunks in the index")
    parser.add_argument("--tokens", type=int, default=10_000, help="tokens in a prompt")
    parser.add_argument("--repeats", type=int, default=100, help="prompts matched for each row")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    done = []
    print(f"{'':42}{'chunks':>9}{'median ms':>11}{'p99 ms':>9}{'covered':>9}{'add ms':>9}{'B/chunk':>9}")
    for row in rows(options.chunks, options.tokens, options.repeats):
        done.append(dataclasses.asdict(row))
        print(
            f"{row.case:42}{row.chunks:9}{row.median_ms:11.2f}{row.p99_ms:9.2f}{row.covered:9.1%}"
            f"{row.add_ms:9.3f}{row.chunk_bytes:9.0f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
