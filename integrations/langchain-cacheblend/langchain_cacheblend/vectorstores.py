"""A vector store whose documents are prefilled when they are added."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from langchain_cacheblend import consistency
from langchain_cacheblend.consistency import RepairReport, VerifyReport
from langchain_cacheblend.listing import list_documents

logger = logging.getLogger(__name__)

_IDS_AT_ONCE = 1000


class _Wrapped:
    """An attribute that is the wrapped store's own: same signature, same docstring, async where that is async."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: CacheBlendVectorStore | None, owner: type) -> Any:
        return self if instance is None else getattr(instance.vectorstore, self.name)


class CacheBlendVectorStore(VectorStore):
    """Any vector store, plus this: what is added is warmed, what is deleted or replaced is evicted.

    The text that is warmed is exactly ``page_content``. Prompts may put anything around it: it is recognised by its
    content.

    Adding and deleting touch the chunk store first and the index second. When the chunk store fails, the index is as
    it was; when the index fails, a chunk is warm or cold that need not be, which costs time, never an answer.
    :meth:`verify` tells whether the two agree, :meth:`repair` makes them agree.

    Searches and all other attributes (``save_local``, ``docstore``, ...) are the wrapped store's. What its class adds
    to the interface of ``VectorStore`` for writing (such as ``add_embeddings``) does not warm; such documents are
    warmed when :class:`CacheBlendRetriever` first returns them.

    Attributes:
        vectorstore: The wrapped store.
        engine: Where documents are warmed and evicted.
    """

    def __init__(self, vectorstore: VectorStore, engine: Engine) -> None:
        """Wrap a store; documents it already holds stay as they are."""
        self.vectorstore = vectorstore
        self.engine = engine
        # The hash of the text behind each id added here. A text is evicted with the last id that holds it. (After
        # index() replaces a document by one that differs in metadata only, the new id still holds the text.) Ids added
        # elsewhere, or before a restart, are not known: such a text may be evicted too early, and is warmed when it is
        # next retrieved, or by repair().
        self._text_hashes: dict[str, int] = {}

    @classmethod
    def from_texts(  # type: ignore[override]  # a wrapper can't be built without what it wraps
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        vectorstore_cls: type[VectorStore],
        engine: Engine,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> CacheBlendVectorStore:
        """Warm texts, then build a store of ``vectorstore_cls`` from them, and wrap it.

        Args:
            texts: Texts to warm and to index.
            embedding: Embeds the texts.
            metadatas: One dict per text.
            vectorstore_cls: Class of the store to build, such as ``FAISS``.
            engine: Where texts are warmed.
            ids: One id per text.
            kwargs: Passed to ``vectorstore_cls.from_texts``.
        """
        engine.warm(texts)
        store = cls(vectorstore_cls.from_texts(texts, embedding, metadatas, **_given(ids), **kwargs), engine)
        store._remember(ids or [], texts)
        return store

    @classmethod
    async def afrom_texts(  # type: ignore[override]
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        vectorstore_cls: type[VectorStore],
        engine: Engine,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> CacheBlendVectorStore:
        """Like :meth:`from_texts`; warming runs in a thread."""
        await asyncio.to_thread(engine.warm, texts)
        store = cls(await vectorstore_cls.afrom_texts(texts, embedding, metadatas, **_given(ids), **kwargs), engine)
        store._remember(ids or [], texts)
        return store

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Warm documents, evict the chunks of those that they replace, then add them to the wrapped store.

        A document is replaced by one with its id, if the wrapped store does that. What :meth:`delete` says of texts
        that stay warm goes for it too.

        Raises:
            ChunkTooLongError: a document does not fit the model's context. The index is unchanged.
            StoreError: the chunk store can't be written. The index is unchanged.
        """
        texts = [document.page_content for document in documents]
        ids = _ids_of(documents, **kwargs)
        self._exchange(ids, self._find(ids), texts)
        return self._remember(self.vectorstore.add_documents(documents, **kwargs), texts)

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Like :meth:`add_documents`; warming and evicting run in a thread."""
        texts = [document.page_content for document in documents]
        ids = _ids_of(documents, **kwargs)
        await asyncio.to_thread(self._exchange, ids, await self._afind(ids), texts)
        return self._remember(await self.vectorstore.aadd_documents(documents, **kwargs), texts)

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Like :meth:`add_documents`, for texts."""
        texts = list(texts)
        replacing = _given_ids(ids)
        self._exchange(replacing, self._find(replacing), texts)
        return self._remember(self.vectorstore.add_texts(texts, metadatas, **_given(ids), **kwargs), texts)

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Like :meth:`add_texts`; warming and evicting run in a thread."""
        texts = list(texts)
        replacing = _given_ids(ids)
        await asyncio.to_thread(self._exchange, replacing, await self._afind(replacing), texts)
        return self._remember(await self.vectorstore.aadd_texts(texts, metadatas, **_given(ids), **kwargs), texts)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Evict the chunks of documents, then delete the documents from the wrapped store.

        Nothing is evicted where the texts can't be known: without ``ids``, or when the wrapped store has no
        ``get_by_ids``. Texts that another document added through this object still holds stay warm. One that only a
        document added elsewhere or before a restart holds becomes cold: prompts with it are prefilled, until it is
        warmed again by :class:`CacheBlendRetriever` or :meth:`repair`.
        """
        try:
            documents = self.vectorstore.get_by_ids(ids) if ids else []
        except NotImplementedError:
            documents = self._unknown_documents()
        self.engine.evict(self._texts_only_in(ids or [], documents))
        return self._forget(ids or [], self.vectorstore.delete(ids, **kwargs))

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Like :meth:`delete`; eviction runs in a thread."""
        try:
            documents = await self.vectorstore.aget_by_ids(ids) if ids else []
        except NotImplementedError:
            documents = self._unknown_documents()
        await asyncio.to_thread(self.engine.evict, self._texts_only_in(ids or [], documents))
        return self._forget(ids or [], await self.vectorstore.adelete(ids, **kwargs))

    def verify(self, documents: Iterable[Document] | None = None, ids: Iterable[str] | None = None) -> VerifyReport:
        """Compare the index with the chunk store; nothing is changed.

        Not to be run while documents are added: they are warm before they are in the index.

        Args:
            documents: All documents of the index.
            ids: The ids of all documents of the index, such as ``record_manager.list_keys()``. Without either, the
                wrapped store is asked: ``FAISS``, ``InMemoryVectorStore``, ``QdrantVectorStore`` and stores with
                Chroma's ``get()`` can list what they hold.

        Raises:
            ConfigError: the wrapped store can't list its documents, or has no ``get_by_ids``, or both are given.
            StoreError: the chunk store can't be read.
        """
        return consistency.compare(self.engine, self._indexed(documents, ids))

    async def averify(
        self, documents: Iterable[Document] | None = None, ids: Iterable[str] | None = None
    ) -> VerifyReport:
        """Like :meth:`verify`; all but the lookup by id runs in a thread."""
        if ids is not None and documents is None:
            batches = _batches(ids)
            try:
                documents = [document for some in batches for document in await self.vectorstore.aget_by_ids(some)]
            except NotImplementedError as error:
                raise self._without_lookup() from error
            ids = None
        return await asyncio.to_thread(self.verify, documents, ids)

    def repair(
        self,
        documents: Iterable[Document] | None = None,
        ids: Iterable[str] | None = None,
        *,
        evict_unknown: bool = False,
    ) -> RepairReport:
        """Warm the documents of the index that are cold.

        Args:
            documents: See :meth:`verify`.
            ids: See :meth:`verify`.
            evict_unknown: Also evict the chunks that none of the documents holds. For a chunk store, or a namespace of
                it, that no other index uses.

        Raises:
            ConfigError: see :meth:`verify`.
            StoreError: the chunk store can't be written; what was done before stays done.
        """
        return consistency.repair(self.engine, self.verify(documents, ids), evict_unknown=evict_unknown)

    async def arepair(
        self,
        documents: Iterable[Document] | None = None,
        ids: Iterable[str] | None = None,
        *,
        evict_unknown: bool = False,
    ) -> RepairReport:
        """Like :meth:`repair`; runs in a thread, see :meth:`averify`."""
        found = await self.averify(documents, ids)
        return await asyncio.to_thread(consistency.repair, self.engine, found, evict_unknown=evict_unknown)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """Search the wrapped store."""
        return self.vectorstore.similarity_search(query, k, **kwargs)

    # VectorStore defines these, so __getattr__ never sees them. A type checker sees VectorStore's signatures.
    if not TYPE_CHECKING:
        embeddings = _Wrapped()
        get_by_ids = _Wrapped()
        aget_by_ids = _Wrapped()
        search = _Wrapped()
        asearch = _Wrapped()
        asimilarity_search = _Wrapped()
        similarity_search_by_vector = _Wrapped()
        asimilarity_search_by_vector = _Wrapped()
        similarity_search_with_score = _Wrapped()
        asimilarity_search_with_score = _Wrapped()
        similarity_search_with_relevance_scores = _Wrapped()
        asimilarity_search_with_relevance_scores = _Wrapped()
        max_marginal_relevance_search = _Wrapped()
        amax_marginal_relevance_search = _Wrapped()
        max_marginal_relevance_search_by_vector = _Wrapped()
        amax_marginal_relevance_search_by_vector = _Wrapped()

    def __getattr__(self, name: str) -> Any:
        """What the wrapped class adds to ``VectorStore``, such as ``save_local``: it can't be listed ahead."""
        if name == "vectorstore":  # not set yet: the object is being copied or unpickled
            raise AttributeError(name)
        return getattr(self.vectorstore, name)

    def _find(self, ids: list[str]) -> list[Document]:
        """The documents that are in the index under some ids, as far as they can be known."""
        try:
            return self.vectorstore.get_by_ids(ids) if ids else []
        except Exception as error:
            return self._unknown_replaced(error)

    async def _afind(self, ids: list[str]) -> list[Document]:
        try:
            return await self.vectorstore.aget_by_ids(ids) if ids else []
        except Exception as error:
            return self._unknown_replaced(error)

    def _unknown_replaced(self, error: Exception) -> list[Document]:
        # Some stores only come to be with their first document: a lookup that fails is no reason not to add it.
        if not isinstance(error, NotImplementedError):
            name = type(self.vectorstore).__name__
            logger.warning("%s.get_by_ids failed, so the chunks of replaced documents stay: %s", name, error)
        return []

    def _exchange(self, ids: list[str], replaced: list[Document], texts: list[str]) -> None:
        """Warm the texts that come to stand behind some ids, and evict those that stood there."""
        self.engine.warm(texts)
        kept = set(texts)
        if gone := [text for text in self._texts_only_in(ids, replaced) if text not in kept]:
            self.engine.evict(gone)

    def _remember(self, ids: list[str], texts: list[str]) -> list[str]:
        self._text_hashes.update(zip(ids, map(hash, texts), strict=False))
        return ids

    def _forget(self, ids: list[str], deleted: bool | None) -> bool | None:
        if deleted is not False:
            for id_ in ids:
                self._text_hashes.pop(id_, None)
        return deleted

    def _texts_only_in(self, ids: Sequence[str], documents: list[Document]) -> list[str]:
        leaving = set(ids)
        held = {text_hash for id_, text_hash in list(self._text_hashes.items()) if id_ not in leaving}
        texts = dict.fromkeys(document.page_content for document in documents)
        return [text for text in texts if hash(text) not in held]

    def _indexed(self, documents: Iterable[Document] | None, ids: Iterable[str] | None) -> list[Document]:
        if ids is None:
            return list_documents(self.vectorstore) if documents is None else list(documents)
        if documents is not None:
            raise ConfigError("give documents or ids, not both")
        try:
            return [document for some in _batches(ids) for document in self.vectorstore.get_by_ids(some)]
        except NotImplementedError as error:
            raise self._without_lookup() from error

    def _without_lookup(self) -> ConfigError:
        return ConfigError(f"{type(self.vectorstore).__name__} has no get_by_ids: pass documents in place of ids")

    def _unknown_documents(self) -> list[Document]:
        logger.warning(
            "%s has no get_by_ids, so the chunks of deleted documents stay in the chunk store",
            type(self.vectorstore).__name__,
        )
        return []


def _batches(ids: Iterable[str]) -> list[list[str]]:
    left = iter(ids)
    return list(iter(lambda: list(itertools.islice(left, _IDS_AT_ONCE)), []))


def _given(ids: list[str] | None) -> dict[str, list[str]]:
    # Not every store's methods take ids.
    return {} if ids is None else {"ids": ids}


def _given_ids(ids: Iterable[str | None] | None) -> list[str]:
    return [id_ for id_ in ids or [] if id_]


def _ids_of(documents: list[Document], ids: Iterable[str | None] | None = None, **kwargs: Any) -> list[str]:
    """The ids that documents are added under, those that are to be made left out."""
    return _given_ids([document.id for document in documents] if ids is None else ids)
