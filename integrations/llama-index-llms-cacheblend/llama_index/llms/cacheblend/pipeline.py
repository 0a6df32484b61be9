"""An ingestion pipeline that keeps the chunk store in step with its document store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode

from llama_index.llms.cacheblend.transform import STATES, CacheBlendTransform


class CacheBlendPipeline(IngestionPipeline):
    """LlamaIndex's pipeline, plus this after each run: chunks of documents that are gone from ``docstore`` are evicted,
    and chunks that were lost meanwhile are warmed again, whatever the pipeline skipped and wherever it ran.
    """  # noqa: D205  # one sentence

    def run(self, *args: Any, **kwargs: Any) -> Sequence[BaseNode]:
        """As in LlamaIndex.

        Raises:
            StoreError: the chunk store can't be written. The next run goes on from there.
        """
        nodes = super().run(*args, **kwargs)
        self._settle()
        return nodes

    async def arun(self, *args: Any, **kwargs: Any) -> Sequence[BaseNode]:
        """Like :meth:`run`. What reads or writes the chunk store, or the ledger, runs in a thread."""
        # LlamaIndex asks for the key of its cache in the event loop. What changes until then is healed afterwards.
        token = STATES.set(await asyncio.to_thread(self._find_states))
        try:
            nodes = await super().arun(*args, **kwargs)
        finally:
            STATES.reset(token)
        await asyncio.to_thread(self._settle)
        return nodes

    def _find_states(self) -> dict[int, list[object]]:
        return {id(transformation): transformation.find_state() for transformation in self._warming()}

    def _settle(self) -> None:
        for transformation in self._warming():
            if self.docstore is not None:
                transformation.evict_removed(self.docstore)
            transformation([])

    def _warming(self) -> list[CacheBlendTransform]:
        return [step for step in self.transformations if isinstance(step, CacheBlendTransform)]
