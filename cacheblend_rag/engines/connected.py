"""What engines have in common whose chunks are kept by the vLLM connector, in this process or another."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from cacheblend_rag.engines.base import Engine
from cacheblend_rag.vllm.settings import MOST_KEYS, Action


class ConnectedEngine(Engine):
    """An engine that asks the connector about chunks by their keys: many in one request."""

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
