"""Compares a sample of live answers with full prefill, and backs off where blending changes them too much.

What a blend costs in quality depends on the model and on the texts; a benchmark of others says little of one's own. The
guard measures it where it counts: of some blended answers it works out, in the background, how far the model's
next-token distributions behind the blended prompt are from those behind the same prompt in full prefill, over the
answer that was given. If they are too far on average, beyond chance, the engine recomputes more; if the most of that is
not enough, it blends no longer.

An engine is of one model and namespace, and so is its guard. What it found is kept while the engine lives.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import queue
import random
import statistics
import threading
from collections.abc import Callable, Sequence

from cacheblend_rag.config import AUTO, BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.validation import is_number

logger = logging.getLogger(__name__)

MOST_KL = 0.1
"""Nats a token, on average, that blended answers may be from full prefill's: as far as ``cacheblend doctor`` allows."""

TURNED_OFF = "the guard has turned blending off"
"""The reason in the stats of prompts that were not blended because of it."""

_LEAST_RATIOS = (0.0, 0.25, 0.5, 1.0)  # one after the other; 1 is full prefill
_FEWEST, _WINDOW = 8, 64  # comparisons that it decides by
_BEYOND_CHANCE = 1.64  # standard errors: 95 %, one-sided
_MOST_WAITING = 2  # answers; more are let go: they hold their prompts
_CLOSE_SECONDS = 5.0  # for a comparison that is under way

Compare = Callable[["Answered"], float]


@dataclasses.dataclass(frozen=True)
class Answered:
    """An answer that was given.

    Attributes:
        prompt: Its token ids, or its text where only a server has the tokenizer.
        token_ids: Those of the answer.
        config: How its prompt was read.
    """

    prompt: str | Sequence[int]
    token_ids: Sequence[int]
    config: BlendConfig


@dataclasses.dataclass(frozen=True)
class GuardReport:
    """What a guard has found so far.

    Attributes:
        compared: Answers that were compared with full prefill.
        dropped: Answers that were not, because others were waiting.
        failed: Comparisons that failed; see the log.
        mean_kl: KL divergence of the next token from full prefill's, nats a token, mean over the last comparisons since
            the ratio was raised; None if there were none.
        least_ratio: Prompts are blended with this ``recompute_ratio`` at least; 0: with what is set, 1: not at all.
    """

    compared: int
    dropped: int
    failed: int
    mean_kl: float | None
    least_ratio: float


def check_share(share: object) -> None:
    """Check the share of the answers that a guard compares.

    Raises:
        ConfigError: it is not in (0, 1].
    """
    if not (is_number(share) and 0 < share <= 1):
        raise ConfigError(f"guard must be a share of the answers in (0, 1], such as 0.02, not {share!r}")


class Guard:
    """Watches the answers of one engine. Threads may share it.

    Args:
        compare: The KL divergence of an answer from full prefill's, nats a token; called in a thread of the guard.
        share: Of the blended answers, how many are compared, in (0, 1].
        most_kl: The mean that is near enough.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(self, compare: Compare, share: float, most_kl: float = MOST_KL) -> None:
        check_share(share)
        self._compare = compare
        self._share = share
        self._most_kl = most_kl
        self._random = random.Random()
        self._lock = threading.Lock()
        self._waiting: queue.Queue[tuple[int, Answered] | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._level = 0
        self._found: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._compared = self._dropped = self._failed = 0

    def adjust(self, config: BlendConfig) -> BlendConfig:
        """The settings that a request is read with: no less is recomputed than the guard has found to be needed."""
        from cacheblend_rag.budget import ratios  # here: it needs torch

        least = _LEAST_RATIOS[self._level]
        if config.mode == "off" or ratios(config)[0] >= least:
            return config
        if least == 1:
            return dataclasses.replace(config, mode="off")
        if config.recompute_ratio == AUTO:
            return dataclasses.replace(config, ratio_range=(least, max(least, config.ratio_range[1])))
        return dataclasses.replace(config, recompute_ratio=least)

    def saw(self, answered: Answered, stats: BlendStats) -> None:
        """Tell of an answer. It is compared by and by, or not; what goes wrong there is logged."""
        if stats.decision != "blend":
            if self._level == len(_LEAST_RATIOS) - 1 and stats.reason == "mode is off":
                stats.reason = TURNED_OFF
            return
        with self._lock:
            if self._closed or not answered.token_ids or self._random.random() >= self._share:
                return
            try:
                self._waiting.put_nowait((self._level, answered))
            except queue.Full:
                self._dropped += 1
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cacheblend-guard", daemon=True)
                self._thread.start()

    @property
    def is_comparing(self) -> bool:
        """Whether this thread is the guard's own: what the engine answers in it was asked by nobody else."""
        return threading.current_thread() is self._thread

    def report(self) -> GuardReport:
        """What was found so far."""
        with self._lock:
            mean = statistics.fmean(self._found) if self._found else None
            return GuardReport(self._compared, self._dropped, self._failed, mean, _LEAST_RATIOS[self._level])

    def reset(self) -> None:
        """Blend as is set again: the cause is mended, such as chunks that were ingested wrongly."""
        with self._lock:
            self._level = 0
            self._found.clear()

    def close(self) -> None:
        """Compare nothing more, and wait a little for what is under way; closing twice does nothing."""
        with self._lock:
            self._closed = True
            thread = self._thread
            while not self._waiting.empty():
                self._waiting.get_nowait()
            self._waiting.put_nowait(None)
        if thread is not None:
            thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while (taken := self._waiting.get()) is not None:
            level, answered = taken
            try:
                kl = self._compare(answered)
            except Exception as error:
                if self._closed:
                    return
                logger.warning("an answer could not be compared with full prefill: %s", error)
                with self._lock:
                    self._failed += 1
                continue
            with self._lock:
                self._compared += 1
                if level == self._level:
                    self._judge(kl)

    def _judge(self, kl: float) -> None:
        self._found.append(kl if math.isfinite(kl) else self._most_kl * _WINDOW)  # NaN is as wrong as can be
        if len(self._found) < _FEWEST or self._level == len(_LEAST_RATIOS) - 1:
            return
        mean = statistics.fmean(self._found)
        error = statistics.stdev(self._found) / math.sqrt(len(self._found))
        if mean - _BEYOND_CHANCE * error <= self._most_kl:
            return
        self._level += 1
        least = _LEAST_RATIOS[self._level]
        logger.warning(
            "blended answers are %.3f nats a token from full prefill (mean of %d, at most %g): %s",
            mean,
            len(self._found),
            self._most_kl,
            "blending is turned off" if least == 1 else f"recompute_ratio is {least:g} at least from now on",
        )
        self._found.clear()
