"""An ingestion pipeline that keeps the chunk store in step with its document store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode

from llama_index.llms.cacheblend.transform import CacheBlendTransform


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
        """Like :meth:`run`. What comes after the transformations, which LlamaIndex runs, runs in a thread."""
        nodes = await super().arun(*args, **kwargs)
        await asyncio.to_thread(self._settle)
        return nodes

    def _settle(self) -> None:
        for transformation in self.transformations:
            if isinstance(transformation, CacheBlendTransform):
                if self.docstore is not None:
                    transformation.evict_removed(self.docstore)
                transformation([])
