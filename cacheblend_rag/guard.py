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
from cacheblend_rag.divergence import MOST_KL
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.validation import is_number

logger = logging.getLogger(__name__)

TURNED_OFF = "the guard has turned blending off"
"""The reason in the stats of prompts that were not blended because of it."""

_LEAST_RATIOS = (0.0, 0.25, 0.5, 1.0)  # one after the other; 1 is full prefill
_FEWEST, _WINDOW = 8, 128  # answers of one ratio that it decides by
# Standard errors. It is looked at after each answer, so it has to be rarer than once would do: at a true mean of as
# much as is allowed, one guard in a hundred raises the ratio within a thousand answers.
_BEYOND_CHANCE = 3.0
_WRONG = 10.0  # nats: what counts for an answer whose distributions are not numbers
_MOST_WAITING = 2  # answers; more are let go: they hold their prompts
_CLOSE_SECONDS = 5.0  # for a comparison that is under way

Compare = Callable[["Answered"], float | None]


class TurnedOff(BlendConfig):
    """Settings of a request that is not blended because of the guard."""


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
        dropped: Answers that were not: others were waiting, or their chunks were gone by then.
        failed: Comparisons that failed; see the log.
        mean_kl: KL divergence of the next token from full prefill's, nats a token, over the first tokens of the last
            answers whose ratio is still in use, mean of their means; on vLLM at least so much. None if there were none.
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
        compare: The KL divergence of an answer from full prefill's, nats a token; None if its prompt is not blended any
            more. Called in a thread of the guard.
        share: Of the blended answers, how many are compared, in (0, 1].

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(self, compare: Compare, share: float) -> None:
        check_share(share)
        self._compare = compare
        self._share = share
        self._random = random.Random()
        self._lock = threading.Lock()
        self._waiting: queue.Queue[Answered | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._closed = False
        self._least = 0.0
        self._found: dict[float, collections.deque[float]] = {}  # by ratio
        self._compared = self._dropped = self._failed = 0

    def adjust(self, config: BlendConfig) -> BlendConfig:
        """The settings that a request is read with: no less is recomputed than the guard has found to be needed."""
        least = self._least
        if config.mode == "off" or not least or _ratio(config) >= least:
            return config
        if least == 1:
            fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
            return TurnedOff(**{**fields, "mode": "off"})
        if config.recompute_ratio == AUTO:
            return dataclasses.replace(config, ratio_range=(least, max(least, config.ratio_range[1])))
        return dataclasses.replace(config, recompute_ratio=least)

    def saw(self, answered: Answered, stats: BlendStats) -> None:
        """Tell of an answer. It is compared by and by, or not; what goes wrong there is logged."""
        if isinstance(answered.config, TurnedOff):
            stats.reason = TURNED_OFF
        if stats.decision != "blend" or not answered.token_ids:
            return
        with self._lock:
            if self._closed or self._random.random() >= self._share:
                return
            try:
                # The list of tokens is the user's by now.
                self._waiting.put_nowait(dataclasses.replace(answered, token_ids=tuple(answered.token_ids)))
            except queue.Full:
                self._dropped += 1
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cacheblend-guard", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # there are too many, or Python is ending
                    self._thread = None
                    logger.debug("the guard can't start its thread: %s", error)

    @property
    def is_comparing(self) -> bool:
        """Whether this thread is the guard's own: what the engine answers in it was asked by nobody else."""
        return threading.current_thread() is self._thread

    def report(self) -> GuardReport:
        """What was found so far."""
        with self._lock:
            found = [kl for of_ratio in self._found.values() for kl in of_ratio]
            mean = statistics.fmean(found) if found else None
            return GuardReport(self._compared, self._dropped, self._failed, mean, self._least)

    def reset(self) -> None:
        """Blend as is set again: the cause is mended, such as chunks that were ingested wrongly."""
        with self._lock:
            self._least = 0.0
            self._found.clear()

    def close(self) -> None:
        """Compare nothing more, and wait a little for what is under way; closing twice does nothing."""
        with self._lock:
            already, self._closed = self._closed, True
            thread = self._thread
        if thread is None or already:
            return
        while True:  # nobody adds any more
            try:
                self._waiting.put_nowait(None)
                break
            except queue.Full:
                self._drop_one()
        thread.join(_CLOSE_SECONDS)

    def _drop_one(self) -> None:
        try:
            self._waiting.get_nowait()
        except queue.Empty:  # the thread was quicker
            return

    def _run(self) -> None:
        while (answered := self._waiting.get()) is not None and not self._closed:
            try:
                kl = self._compare(answered)
            except Exception as error:
                if self._closed:
                    return
                with self._lock:
                    self._failed += 1
                level = logging.WARNING if self._failed == 1 else logging.DEBUG
                logger.log(level, "an answer could not be compared with full prefill: %s", error)
                continue
            with self._lock:
                # One that began before the ratio was raised says nothing of the new one.
                if kl is None or self.adjust(answered.config) != answered.config:
                    self._dropped += 1
                else:
                    self._compared += 1
                    self._judge(kl, _ratio(answered.config))

    def _judge(self, kl: float, ratio: float) -> None:
        found = self._found.setdefault(ratio, collections.deque(maxlen=_WINDOW))
        found.append(kl if math.isfinite(kl) else _WRONG)
        if len(found) < _FEWEST or ratio >= 1:
            return
        mean = statistics.fmean(found)
        if mean - _BEYOND_CHANCE * statistics.stdev(found) / math.sqrt(len(found)) <= MOST_KL:
            return
        self._least = next(least for least in _LEAST_RATIOS if least > ratio)
        for of_ratio in [of_ratio for of_ratio in self._found if of_ratio < self._least]:
            del self._found[of_ratio]
        logger.warning(
            "answers at recompute_ratio %g are %.3f nats a token from full prefill (mean of %d, at most %g): %s",
            ratio,
            mean,
            len(found),
            MOST_KL,
            "blending is turned off" if self._least == 1 else f"it is {self._least:g} at least from now on",
        )


def _ratio(config: BlendConfig) -> float:
    """The least share of the matched tokens that is recomputed."""
    from cacheblend_rag.budget import ratios  # here: it needs torch

    return ratios(config)[0]
