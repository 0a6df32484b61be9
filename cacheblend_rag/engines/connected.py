"""What engines have in common whose chunks are kept by the vLLM connector, in this process or another."""

from __future__ import annotations

import abc
import dataclasses
import secrets
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.divergence import TOPS, divergence_of_tops
from cacheblend_rag.engines.base import Engine, SamplingParams
from cacheblend_rag.guard import Answered
from cacheblend_rag.stats import BlendStats, Generation
from cacheblend_rag.vllm.settings import MOST_KEYS, Action

_COMPARED = 4  # tokens of an answer that a guard compares
_MODES: tuple[Literal["blend", "off"], ...] = ("blend", "off")
_FIRST_TOKEN = SamplingParams(max_tokens=1, logprobs=TOPS)


class ConnectedEngine(Engine):
    """An engine that asks the connector about chunks by their keys: many in one request."""

    counts: Counter[str]

    @abc.abstractmethod
    def _read_apart(self, ids: list[int], config: BlendConfig, params: SamplingParams, salt: str) -> Generation:
        """Answer a prompt beside all others.

        In vLLM's prefix cache only requests of the same salt find its blocks, and no metrics of ours count it.
        """

    def _divergence(self, answered: Answered) -> float | None:
        """See :class:`Engine`. Each token that is compared is a request: those before it stand in its prompt."""
        ids, salt = self._prompt_ids(answered.prompt), secrets.token_hex(8)
        compared = []
        for count in range(min(len(answered.token_ids), _COMPARED)):
            asked = [*ids, *answered.token_ids[:count]]
            # By its mode alone: "auto" would rather prefill so short a rest as another request of the prompt leaves.
            blended, full = (
                self._read_apart(asked, dataclasses.replace(answered.config, mode=mode), _FIRST_TOKEN, f"{salt}-{mode}")
                for mode in _MODES
            )
            if not count and blended.stats.decision != "blend":
                return None
            assert full.logprobs is not None
            assert blended.logprobs is not None  # they were asked for
            compared.append(divergence_of_tops(full.logprobs[0], blended.logprobs[0]))
        return statistics.fmean(compared)

    def _finished(self, answered: Answered, stats: BlendStats) -> None:
        """See :class:`Engine`."""
        if not self._is_comparing:
            self.counts[stats.decision] += 1
            self.counts["chunk_fault"] += stats.faults
        super()._finished(answered, stats)

    @abc.abstractmethod
    def _ask(self, action: Action, value: Any, ids: Sequence[int] = (0,)) -> dict[str, Any]:
        """The connector's answer to a request for an action, its prompt being ``ids``."""

    def describe(self) -> dict[str, Any]:
        """What the connector tells of itself: its version, the model's fingerprint, primer, namespace, settings."""
        return self._ask("describe", True)

    def evict_keys(self, keys: Sequence[str]) -> int:
        """See :meth:`Engine.evict_keys`."""
        return sum(self._ask("evict_keys", some)["evicted"] for some in _batches(keys))

    def _held(self, keys: Sequence[str]) -> set[str]:
        return {key for some in _batches(keys) for key in self._ask("lookup", some)["held"]}

    def _keys_since(self, cursor: int) -> tuple[int, list[str]]:
        answer = self._ask("list_keys", cursor)
        return answer["cursor"], answer["keys"]

    def _bring(self, chunks: list[str]) -> None:
        """Prefetch chunks, at most :data:`MOST_KEYS`."""
        self._ask("prefetch", self.chunk_keys(chunks))


def _batches(keys: Sequence[str]) -> list[list[str]]:
    return [list(keys[first : first + MOST_KEYS]) for first in range(0, len(keys), MOST_KEYS)]
