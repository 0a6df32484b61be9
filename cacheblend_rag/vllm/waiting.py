"""Lets requests whose chunks are on disk wait outside of steps: reading within one would hold up all others."""

from __future__ import annotations

import dataclasses
import time
from collections import OrderedDict
from collections.abc import Iterable

# Something went wrong with the reading, or far too much is to be read: the step reads what is left.
_MOST_SECONDS = 10.0


class MemoryTier:
    """What the scheduler half knows of the chunks in the workers' memory: as good as what they told last.

    They drop what was used longest ago, and so does this. Where it is wrong, a step reads from disk, or a request waits
    for a chunk that is in memory already.

    Args:
        max_bytes: Of the workers' memory tier; 0: nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._known: OrderedDict[str, int] = OrderedDict()  # least recently used first

    def add(self, key: str, nbytes: int) -> None:
        """A chunk has been brought to memory."""
        self._nbytes += nbytes - self._known.pop(key, 0)
        self._known[key] = nbytes
        while self._nbytes > self._max_bytes:
            self._nbytes -= self._known.popitem(last=False)[1]

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Which of some chunks, about to be used, are to be brought; none if memory keeps nothing."""
        if not self._max_bytes:
            return []
        found = []
        for key in keys:
            if key in self._known:
                self._known.move_to_end(key)
            else:
                found.append(key)
        return found


@dataclasses.dataclass
class DiskWait:
    """What one request waits for.

    Attributes:
        missing: Keys of chunks that are on their way to memory.
        spared: Tokens that could be prefilled in the time that waiting saves.
        began: ``time.monotonic()``.
    """

    missing: set[str]
    spared: float
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether the request may go on."""
        return not self.missing or time.monotonic() - self.began > _MOST_SECONDS
