"""``langchain_core.indexing`` over a store that warms: what it adds is warm, what it removes is evicted, and a run that
fails is made good by the next."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ChunkTooLongError, StoreError
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from langchain_cacheblend import CacheBlendVectorStore

Passages = Callable[[int], list[str]]
EMBEDDING = DeterministicFakeEmbedding(size=16)
MODES: list[Any] = [None, "incremental", "full", "scoped_full"]
both = pytest.mark.parametrize("use_async", [False, True], ids=["index", "aindex"])
every_store = pytest.mark.parametrize(
    ("make_index", "use_async"),
    [("memory", False), ("memory", True), ("faiss", False), ("qdrant", True)],
    indirect=["make_index"],
)


@pytest.fixture
def passages(passages: Passages) -> Passages:
    """Short ones: how prompts are read is not looked at here."""
    return lambda count: [text[:100] for text in passages(count)]


class Indexed:
    """A vector store and a record manager, filled by ``index`` or ``aindex``."""

    def __init__(self, store: VectorStore, engine: Engine, *, use_async: bool = False) -> None:
        self.store = CacheBlendVectorStore(store, engine)
        self.records = InMemoryRecordManager(namespace="notes")
        self.records.create_schema()
        self._use_async = use_async

    async def run(self, documents: list[Document], cleanup: Any, **settings: Any) -> tuple[int, int, int, int]:
        """How many were added, updated, skipped and deleted."""
        settings = {"cleanup": cleanup, "source_id_key": "source", "key_encoder": _name, **settings}
        if self._use_async:
            result = await aindex(documents, self.records, self.store, **settings)
        else:
            result = index(documents, self.records, self.store, **settings)
        return result["num_added"], result["num_updated"], result["num_skipped"], result["num_deleted"]

    def texts(self) -> set[str]:
        return {document.page_content for document in self.store.similarity_search("any", k=20)}


def _name(document: Document) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{document.page_content} {document.metadata}"))


def _document(text: str, source: str = "s", **metadata: Any) -> Document:
    return Document(text, metadata={"source": source, **metadata})


@every_store
@pytest.mark.parametrize("cleanup", MODES)
async def test_cleanup_modes(
    make_index: Callable[[Embeddings], VectorStore], engine: Engine, passages: Passages, cleanup: Any, use_async: bool
) -> None:
    kept, changed, gone, elsewhere, new = passages(5)
    indexed = Indexed(make_index(EMBEDDING), engine, use_async=use_async)
    first = [_document(kept), _document(changed), _document(gone), _document(elsewhere, "t")]
    assert await indexed.run(first, cleanup) == (4, 0, 0, 0)
    assert await indexed.run(first, cleanup) == (0, 0, 4, 0)
    assert engine.is_warm([kept, changed, gone, elsewhere, new]) == [True, True, True, True, False]
    second = [_document(kept), _document(changed, page=2), _document(new)]
    removed = {None: set(), "full": {gone, elsewhere}}.get(cleanup, {gone})
    deleted = len(removed) + 1 if cleanup else 0  # and the document whose metadata changed, but not its text
    assert await indexed.run(second, cleanup) == (2, 0, 1, deleted)
    texts = [kept, changed, gone, elsewhere, new]
    assert indexed.texts() == set(texts) - removed
    assert engine.is_warm(texts) == [text not in removed for text in texts]


@every_store
async def test_a_failed_warm_is_made_good_by_the_next_run(
    make_index: Callable[[Embeddings], VectorStore],
    engine: Engine,
    passages: Passages,
    while_disk_is_full: Callable[[], AbstractContextManager[None]],
    use_async: bool,
) -> None:
    texts = passages(2)
    indexed = Indexed(make_index(EMBEDDING), engine, use_async=use_async)
    documents = [_document(text) for text in texts]
    with while_disk_is_full(), pytest.raises(StoreError):
        await indexed.run(documents, "full")
    assert indexed.texts() == set()
    assert indexed.records.list_keys() == []
    assert engine.is_warm(texts) == [False, False]
    assert await indexed.run(documents, "full") == (2, 0, 0, 0)
    assert indexed.texts() == set(texts)
    assert engine.is_warm(texts) == [True, True]


@both
async def test_a_failed_warm_leaves_earlier_batches(engine: Engine, passages: Passages, use_async: bool) -> None:
    texts = passages(3)
    indexed = Indexed(InMemoryVectorStore(EMBEDDING), engine, use_async=use_async)
    too_long = [texts[0], "word " * engine.context_window, texts[2]]
    with pytest.raises(ChunkTooLongError):
        await indexed.run([_document(text) for text in too_long], "incremental", batch_size=1)
    assert indexed.texts() == {texts[0]}
    assert len(indexed.records.list_keys()) == 1
    assert engine.is_warm(texts) == [True, False, False]
    assert await indexed.run([_document(text) for text in texts], "incremental", batch_size=1) == (2, 0, 1, 0)
    assert indexed.texts() == set(texts)
    assert engine.is_warm(texts) == [True, True, True]


@both
async def test_a_failed_eviction_is_made_good_by_the_next_run(
    engine: Engine, passages: Passages, monkeypatch: pytest.MonkeyPatch, use_async: bool
) -> None:
    texts = passages(2)
    kept = texts[0]
    indexed = Indexed(InMemoryVectorStore(EMBEDDING), engine, use_async=use_async)
    await indexed.run([_document(text) for text in texts], "full")

    def fail(key: str) -> bool:
        raise StoreError("the disk is read-only")

    with monkeypatch.context() as patch:
        patch.setattr(engine.library.store, "delete", fail)
        with pytest.raises(StoreError, match="read-only"):
            await indexed.run([_document(kept)], "full")
    assert indexed.texts() == set(texts)
    assert len(indexed.records.list_keys()) == 2
    assert await indexed.run([_document(kept)], "full") == (0, 0, 1, 1)
    assert indexed.texts() == {kept}
    assert engine.is_warm(texts) == [True, False]


@pytest.fixture
def stored(engine: Engine) -> Callable[[], dict[str, float]]:
    """When each chunk was stored: one that is warmed again is stored again only if it was gone."""
    return lambda: {info.key: info.created for info in engine.library.store.entries()}


@pytest.mark.parametrize("cleanup", ["incremental", "full"])
@pytest.mark.parametrize("change", ["edited", "split anew"])
async def test_only_what_changed_is_warmed_again(
    engine: Engine, passages: Passages, stored: Callable[[], dict[str, float]], change: str, cleanup: Any
) -> None:
    before = stored()
    one, two, three, four = paragraphs = passages(4)
    indexed = Indexed(InMemoryVectorStore(EMBEDDING), engine)

    def split(paragraphs: list[str], size: int) -> list[Document]:
        text = Document("\n\n".join(paragraphs), metadata={"source": "s"})
        splitter = RecursiveCharacterTextSplitter(chunk_size=size, chunk_overlap=0)
        return splitter.split_documents([text, _document(one, "another")])

    longest = max(map(len, paragraphs)) + 1
    first = split(paragraphs, longest)
    assert len(first) == 5
    await indexed.run(first, cleanup)
    then = stored()
    second = split([one, two, three[:-9], four], longest) if change == "edited" else split(paragraphs, 2 * longest + 2)
    assert len(second) == (5 if change == "edited" else 3)
    await indexed.run(second, cleanup)
    now = stored()
    old, new = (set(engine.chunk_keys([d.page_content for d in documents])) for documents in (first, second))
    assert then.keys() - before.keys() == old
    assert now.keys() - before.keys() == new
    assert len(new - old) == (1 if change == "edited" else 2)
    assert all(now[key] == then[key] for key in old & new)


async def test_embedding_anew_warms_nothing(
    engine: Engine, passages: Passages, stored: Callable[[], dict[str, float]]
) -> None:
    indexed = Indexed(InMemoryVectorStore(EMBEDDING), engine)
    documents = [_document(text) for text in passages(2)]
    await indexed.run(documents, "full")
    then = stored()
    indexed.store.vectorstore.embedding = DeterministicFakeEmbedding(size=8)
    assert await indexed.run(documents, "full", force_update=True) == (0, 2, 0, 0)
    assert {len(entry["vector"]) for entry in indexed.store.vectorstore.store.values()} == {8}
    assert stored() == then
