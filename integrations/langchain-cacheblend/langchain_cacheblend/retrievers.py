"""A retriever whose documents are warm when the prompt that holds them is read."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

from cacheblend_rag.engines.base import Engine
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import patch_config

logger = logging.getLogger(__name__)


class CacheBlendRetriever(BaseRetriever):
    """Any retriever, plus this: documents it returns that are not warm yet are warmed.

    For documents that were indexed before CacheBlend came, or by another process: the first prompt that holds one pays
    for its prefill, all later ones reuse it. Order and content of the documents are those of the wrapped retriever.
    Warming is never a reason for retrieval to fail: whatever goes wrong there is logged as a warning.

    Attributes:
        retriever: The wrapped retriever, or any runnable from a query to documents.
        engine: Where documents are warmed.
        on_miss: ``"warm"`` warms what is cold; ``"ignore"`` leaves it cold.
    """

    retriever: RetrieverLike
    engine: Engine
    on_miss: Literal["warm", "ignore"] = "warm"

    # BaseRetriever keeps the config from _get_relevant_documents; it reaches the wrapped retriever as this argument.

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """The wrapped retriever's documents, warm; ``config`` and ``kwargs`` are passed on to it."""
        return super().invoke(input, config, outer_config=ensure_config(config), **kwargs)

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Like :meth:`invoke`; warming runs in a thread."""
        return await super().ainvoke(input, config, outer_config=ensure_config(config), **kwargs)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        outer_config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(outer_config, callbacks=run_manager.get_child())
        documents = self.retriever.invoke(query, config, **kwargs)
        if self.on_miss == "warm":
            self._warm(documents)
        return documents

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        outer_config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        config = patch_config(outer_config, callbacks=run_manager.get_child())
        documents = await self.retriever.ainvoke(query, config, **kwargs)
        if self.on_miss == "warm":
            await asyncio.to_thread(self._warm, documents)
        return documents

    def _warm(self, documents: list[Document]) -> None:
        try:
            self.engine.warm([document.page_content for document in documents])
        except Exception as error:  # the answer does not depend on warming, so nothing that goes wrong there may
            logger.warning("Documents stay cold, warming them failed: %s", error)
