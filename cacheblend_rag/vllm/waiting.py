"""Lets requests whose chunks are on disk wait outside of steps: reading within one would hold up all others."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping

# Something went wrong with the reading, or far too much is to be read: the step reads what is left.
_MOST_SECONDS = 10.0


class MemoryTier:
    """What the scheduler half knows of the chunks in the workers' memory: as good as what they told last.

    They drop what was used longest ago, and so does this. Where it is wrong, a step reads from disk, or a request waits
    for a chunk that is in memory already.

    Args:
        max_bytes: Of the workers' memory tier.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._known: OrderedDict[str, int] = OrderedDict()  # least recently used first

    def add(self, brought: Mapping[str, int]) -> None:
        """Chunks that have been brought to memory, with their bytes."""
        for key, nbytes in brought.items():
            self._nbytes += nbytes - self._known.pop(key, 0)
            self._known[key] = nbytes
        while self._nbytes > self._max_bytes:
            self._nbytes -= self._known.popitem(last=False)[1]

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Which of some chunks, about to be used, are not in memory; none if memory keeps nothing."""
        if not self._max_bytes:
            return set()
        found = set()
        for key in keys:
            if key in self._known:
                self._known.move_to_end(key)
            else:
                found.add(key)
        return found


class DiskWait:
    """What one request waits for.

    Args:
        missing: Keys of chunks that are on their way to memory.
    """

    def __init__(self, missing: set[str]) -> None:
        self._missing = missing
        self._until = time.monotonic() + _MOST_SECONDS

    def is_over(self, memory: MemoryTier) -> bool:
        """Whether the request may go on."""
        self._missing = memory.missing(self._missing)
        return not self._missing or time.monotonic() > self._until
