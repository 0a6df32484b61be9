"""Brings chunks nearer in the background, while something else is done."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

_MOST_WAITING = 1024  # chunks; far more than a prompt holds
_CLOSE_SECONDS = 5.0  # for what is under way: a file, or a request to a server that may never answer


class Prefetcher:
    """Threads that work off a short queue, and are there only while something waits. Threads may share it.

    Prefetching saves time or does nothing: what exceeds the queue is dropped, and a failure is logged.

    Args:
        bring: Called in a thread with what waits, in order, at most ``batch`` at a time.
        batch: See ``bring``.
        threads: How many threads at most.
    """

    def __init__(self, bring: Callable[[list[str]], object], *, batch: int, threads: int = 1) -> None:
        self._bring = bring
        self._batch = batch
        self._lock = threading.Lock()
        self._waiting: dict[str, None] = {}  # a set that keeps its order
        self._most_threads = threads
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def add(self, items: Iterable[str]) -> None:
        """Queue texts or keys, and return at once. Closed: does nothing."""
        with self._lock:
            if self._closed:
                return
            for item in items:
                if len(self._waiting) == _MOST_WAITING:
                    logger.debug("more than %d chunks wait for being prefetched: the rest is not", _MOST_WAITING)
                    break
                self._waiting[item] = None
            batches = -(-len(self._waiting) // self._batch)
            for _ in range(min(batches, self._most_threads - len(self._threads))):
                thread = threading.Thread(target=self._run, name="cacheblend-prefetch", daemon=True)
                self._threads.add(thread)
                thread.start()

    def close(self) -> None:
        """Drop what waits, and wait a little for what is under way; closing twice does nothing."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            threads = list(self._threads)
        until = time.monotonic() + _CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while items := self._take():
            try:
                self._bring(items)
            except Exception as error:
                level = logging.DEBUG if self._closed else logging.WARNING
                logger.log(level, "prefetching failed, the chunks are read when they are needed: %s", error)

    def _take(self) -> list[str]:
        with self._lock:
            items = list(itertools.islice(self._waiting, self._batch))
            for item in items:
                del self._waiting[item]
            if not items:
                self._threads.discard(threading.current_thread())
            return items
