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

from langchain_cacheblend.warming import warm_what_fits

logger = logging.getLogger(__name__)


class CacheBlendRetriever(BaseRetriever):
    """Any retriever, plus this: documents it returns that are not warm yet are warmed.

    For documents that were indexed before CacheBlend came, or by another process: the first prompt that holds one pays
    for its prefill, all later ones reuse it. Content and, unless ``best_last``, order of the documents are those of the
    wrapped retriever. Neither warming nor prefetching is a reason for retrieval to fail: whatever goes wrong there is
    logged as a warning.

    What is warmed is what is returned: around a ``ParentDocumentRetriever`` the parents, which the prompt will hold.
    A ``ContextualCompressionRetriever`` belongs outside, with this one as its base: whole documents are warmed once,
    and a shortened text reuses the runs of them that are left of it.

    Attributes:
        retriever: The wrapped retriever, or any runnable from a query to documents.
        engine: Where documents are warmed.
        on_miss: ``"warm"`` warms what is cold before documents are returned; ``"ignore"`` leaves it cold.
        prefetch: Begin to bring what is warm from the chunk store's disk to its memory, while the prompt is being
            built.
        best_last: Return the documents in reverse, so that the retriever's first is next to a question that follows
            them. A blend is nearer to full prefill that way (see the project's docs/quality.md). To be set on the
            outermost retriever: one around it that ranks again, or keeps the first few, would undo it.
    """

    retriever: RetrieverLike
    engine: Engine
    on_miss: Literal["warm", "ignore"] = "warm"
    prefetch: bool = True
    best_last: bool = False

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
        self._prepare(documents)
        return self._ordered(documents)

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
        await asyncio.to_thread(self._prepare, documents)
        return self._ordered(documents)

    def _ordered(self, documents: list[Document]) -> list[Document]:
        return documents[::-1] if self.best_last else documents

    def _prepare(self, documents: list[Document]) -> None:
        texts = [document.page_content for document in documents]
        try:
            if self.prefetch:  # first: disks are read while the model prefills
                self.engine.prefetch(texts)
            if self.on_miss == "warm":
                _, too_long = warm_what_fits(self.engine, texts)
                if too_long:
                    logger.warning("%d documents stay cold, they do not fit the model's context", len(too_long))
        except Exception as error:  # the answer does not depend on this, so nothing that goes wrong here may
            logger.warning("Documents stay cold, warming them failed: %s", error)
