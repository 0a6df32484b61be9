"""Whether chunks on disk are worth waiting for: what reading them takes, against computing what they spare."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Sequence

_LATELY = 16  # reports: a disk's speed depends on who else reads
_LATE = 2.0  # times as long as expected
_LOST_SECONDS = 60.0  # the workers have let go of a chunk that does not come for so long


@dataclasses.dataclass(frozen=True)
class DiskChunk:
    """A chunk that a prompt needs and that is on disk.

    Attributes:
        key: The chunk's.
        to_read: Its tokens; 0 if it is being read already.
        spared: Tokens of the prompt that need not be computed with it.
    """

    key: str
    to_read: int
    spared: float


@dataclasses.dataclass(frozen=True)
class _Asked:
    tokens: int
    at: float  # time.monotonic()
    expected: float  # seconds


class DiskCosts:
    """What is known of an engine's disk and of its model.

    Chunks that have been asked for come in turn, so all that are still to come are waited for. That one has come is
    heard of at the end of a step, and steps may be far between: what should have come since then counts as there.

    Attributes:
        prefill: What plain prefill takes at least, in seconds a token; None: not known.
        heard_at: ``time.monotonic()`` when the workers told last what has come.
    """

    def __init__(self) -> None:
        self.prefill: float | None = None
        self._reads: deque[tuple[int, float]] = deque(maxlen=_LATELY)
        self._coming: dict[str, _Asked] = {}  # oldest first
        self.heard_at = 0.0

    def note_read(self, tokens: int, seconds: float) -> None:
        """So many tokens of chunks, at least one, took so long from disk to memory."""
        self._reads.append((tokens, seconds))

    def note_asked(self, key: str, tokens: int) -> None:
        """A chunk of so many tokens is to be read, behind all that are to be read already."""
        expected = self.wait + tokens * (self._read or 0.0)
        self._coming.setdefault(key, _Asked(tokens, time.monotonic(), expected))

    def note_come(self, key: str) -> None:
        """A chunk has been read, or can't be."""
        self._coming.pop(key, None)

    def note_heard(self) -> None:
        """All that had come by now has been noted."""
        self.heard_at = time.monotonic()
        for key, asked in list(self._coming.items()):
            if self.heard_at - asked.at > _LOST_SECONDS:
                del self._coming[key]

    def is_coming(self, key: str) -> bool:
        """Whether a chunk has been asked for and not come yet."""
        return key in self._coming

    @property
    def wait(self) -> float:
        """Seconds until all that is to be read should have been."""
        if not self._coming:
            return 0.0
        oldest = next(iter(self._coming.values()))
        since = max(self.heard_at, oldest.at)
        seconds = sum(asked.tokens for asked in self._coming.values()) * (self._read or 0.0)
        if since - oldest.at > _LATE * oldest.expected:  # for all that is known, it takes as long again
            seconds = max(seconds, since - oldest.at)
        return max(0.0, seconds - (time.monotonic() - since))

    def too_slow(self, chunks: Sequence[DiskChunk], lost: int = 0, most: float = math.inf) -> set[str]:
        """Those chunks that take longer to read than they save. None, as long as too little is known.

        Args:
            chunks: On disk, of one prompt.
            lost: Tokens that have to be computed, too, if any chunk is left out.
            most: What blending the prompt gains at all, in tokens that could be prefilled in that time.
        """
        if self.prefill is None or self._read is None:
            return set()
        everything = sum(chunk.to_read for chunk in chunks) * self._read + self.wait
        if lost and everything <= min(lost + sum(chunk.spared for chunk in chunks), most) * self.prefill:
            return set()
        worth = [chunk for chunk in chunks if chunk.to_read * self._read <= chunk.spared * self.prefill]
        seconds = self.wait + sum(chunk.to_read for chunk in worth) * self._read
        if seconds > min(sum(chunk.spared for chunk in worth), most) * self.prefill:
            worth = []
        return {chunk.key for chunk in chunks} - {chunk.key for chunk in worth}

    @property
    def _read(self) -> float | None:
        """Seconds a token from disk to memory; None: nothing has been read yet."""
        if not self._reads:
            return None
        return sum(seconds for _, seconds in self._reads) / sum(tokens for tokens, _ in self._reads)
