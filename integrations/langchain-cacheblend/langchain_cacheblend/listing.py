"""All documents of a vector store: LangChain's interface has no call for that."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from cacheblend_rag.errors import ConfigError
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

_PAGE = 1000


def list_documents(store: VectorStore) -> list[Document]:
    """Every document of a store.

    It may be ``InMemoryVectorStore``, ``FAISS``, ``QdrantVectorStore``, or one with Chroma's ``get()``. All but the
    first are recognised by what they offer, so that none has to be installed.

    Raises:
        ConfigError: the store is of another kind.
    """
    if isinstance(store, InMemoryVectorStore):
        return [Document(entry["text"], id=id_, metadata=entry["metadata"]) for id_, entry in list(store.store.items())]
    if hasattr(store, "index_to_docstore_id") and hasattr(store, "docstore"):  # FAISS
        return store.get_by_ids(list(store.index_to_docstore_id.values()))
    if hasattr(store, "content_payload_key") and hasattr(store, "client"):  # Qdrant
        return list(_scroll(store))
    if hasattr(store, "get") and "include" in inspect.signature(store.get).parameters:  # Chroma
        found = store.get(include=["documents", "metadatas"])
        rows = zip(found["ids"], found["documents"], found["metadatas"], strict=True)
        return [Document(text or "", id=id_, metadata=metadata or {}) for id_, text, metadata in rows]
    raise ConfigError(
        f"{type(store).__name__} can't list its documents: pass ids, such as record_manager.list_keys(), or documents"
    )


def _scroll(store: Any) -> Iterator[Document]:
    offset = None
    while True:
        points, offset = store.client.scroll(store.collection_name, limit=_PAGE, offset=offset)
        for point in points:
            payload = point.payload or {}
            metadata = payload.get(store.metadata_payload_key) or {}
            yield Document(payload.get(store.content_payload_key) or "", id=str(point.id), metadata=metadata)
        if offset is None:
            return
