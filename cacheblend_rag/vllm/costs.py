"""Whether chunks on disk are worth waiting for: what reading took lately, against what computing took."""

from __future__ import annotations

import statistics
from collections import deque

_LATELY = 16


class DiskCosts:
    """What an engine has seen of its disk and its model, in seconds a token.

    A disk's speed depends on who else reads, so the middle of what was seen lately counts. Computing a token takes
    least where many are computed together, as in the prefill that a blend replaces, so there the least counts.
    """

    def __init__(self) -> None:
        self._read: deque[float] = deque(maxlen=_LATELY)
        self._computed: deque[float] = deque(maxlen=_LATELY)

    def note_read(self, tokens: int, seconds: float) -> None:
        """So many tokens of chunks, at least one, took so long from disk to where they can be used."""
        self._read.append(seconds / tokens)

    def note_computed(self, tokens: int, seconds: float) -> None:
        """So many tokens, at least one, ran through the model."""
        self._computed.append(seconds / tokens)

    def pays(self, to_read: int, spared: int) -> bool:
        """Whether reading some tokens takes no longer than computing others; True where one of the two is unknown.

        Args:
            to_read: Tokens of the chunks that are on disk.
            spared: Tokens that need not be computed with them.
        """
        if not self._read or not self._computed:
            return True
        return to_read * statistics.median(self._read) <= spared * min(self._computed)
