from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import faiss
import pytest
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ChunkTooLongError, StoreError
from langchain_community.docstore.in_memory import InMemoryDocstore
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from langchain_qdrant import QdrantVectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests

from langchain_cacheblend import CacheBlendLLM, CacheBlendVectorStore

Passages = Callable[[int], list[str]]
AssertLoopRuns = Callable[[Awaitable[object]], Awaitable[None]]
WasWarm = Callable[[list[str]], list[bool]]
EMBEDDING = DeterministicFakeEmbedding(size=16)
ADDS = ["add_documents", "add_texts", "aadd_documents", "aadd_texts"]


def _faiss() -> FAISS:
    return FAISS(EMBEDDING, faiss.IndexFlatL2(16), InMemoryDocstore(), {})


@pytest.fixture(params=[lambda: InMemoryVectorStore(EMBEDDING), _faiss], ids=["memory", "faiss"])
def index(request: pytest.FixtureRequest) -> VectorStore:
    made: VectorStore = request.param()
    return made


@pytest.fixture
def store(index: VectorStore, engine: Engine) -> CacheBlendVectorStore:
    return CacheBlendVectorStore(index, engine)


def _documents(texts: list[str], **metadata: Any) -> list[Document]:
    return [Document(text, metadata=metadata) for text in texts]


class TestStandard(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, engine: Engine, make_index: Callable[[Embeddings], VectorStore]) -> VectorStore:
        index = make_index(self.get_embeddings())
        if isinstance(index, QdrantVectorStore):
            index = _NamedPoints(index.client, index.collection_name, self.get_embeddings())
        if isinstance(index, FAISS):
            index = _Upserting(self.get_embeddings(), index.index, index.docstore, {})
        return CacheBlendVectorStore(index, engine)


# What the suite asks of a store, and these two do not do by themselves. All else of it goes through to them.


class _Upserting(FAISS):
    """FAISS that replaces documents of the same id, and does not mind ids that it does not have."""

    def add_texts(self, texts: Iterable[str], metadatas: Any = None, ids: Any = None, **kwargs: Any) -> list[str]:
        self.delete(ids or [])
        return super().add_texts(texts, metadatas, ids, **kwargs)

    async def aadd_texts(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.add_texts(*args, **kwargs)

    def delete(self, ids: Any = None, **kwargs: Any) -> bool | None:
        known = set(self.index_to_docstore_id.values()) & set(ids)
        return super().delete(list(known), **kwargs) if known else True


class _NamedPoints(QdrantVectorStore):
    """Qdrant with ids that are no UUIDs, and documents with their ids and no further metadata."""

    def add_texts(self, texts: Iterable[str], metadatas: Any = None, ids: Any = None, **kwargs: Any) -> list[str]:
        texts = list(texts)
        names = [name or str(uuid.uuid4()) for name in ids or [None] * len(texts)]
        metadatas = [{**data, "name": name} for data, name in zip(metadatas or [{}] * len(texts), names, strict=True)]
        super().add_texts(texts, metadatas, self._points(names), **kwargs)
        return names

    def delete(self, ids: Any = None, **kwargs: Any) -> bool | None:
        return super().delete(self._points(ids), **kwargs)

    def get_by_ids(self, ids: Any, /) -> list[Document]:
        return super().get_by_ids(self._points(ids))

    def _points(self, names: list[str]) -> list[str]:
        return [str(uuid.uuid5(uuid.NAMESPACE_OID, name)) for name in names]

    @classmethod
    def _document_from_point(cls, *args: Any) -> Document:
        found = super()._document_from_point(*args)
        metadata = {key: value for key, value in found.metadata.items() if key not in ("_id", "_collection_name")}
        return Document(found.page_content, id=metadata.pop("name"), metadata=metadata)


@pytest.mark.parametrize("method", ADDS)
async def test_added_documents_are_reused(
    store: CacheBlendVectorStore, engine: Engine, passages: Passages, method: str
) -> None:
    texts = passages(2)
    prompt = "Notes:\n\n" + "\n\n".join(reversed(texts)) + "\n\nSummary:"
    assert engine.evict(texts) == 0
    added = getattr(store, method)(_documents(texts) if "documents" in method else texts)
    ids = await added if method.startswith("a") and method[1:].startswith("add") else added
    assert [document.page_content for document in store.get_by_ids(ids)] == texts
    info = CacheBlendLLM(engine=engine, max_tokens=1).generate([prompt]).generations[0][0].generation_info
    assert info is not None
    stats = info["stats"]
    assert stats["segments"] == 2
    assert stats["reused_tokens"] + stats["recomputed_tokens"] > 0.9 * sum(map(engine.count_tokens, texts))
    assert stats["reused_tokens"] > 0.5 * stats["prompt_tokens"]


def test_add_texts_takes_generators_metadata_and_ids(store: CacheBlendVectorStore, passages: Passages) -> None:
    texts = passages(2)
    assert store.add_texts(iter(texts), [{"n": 0}, {"n": 1}], ids=["x", "y"]) == ["x", "y"]
    assert store.get_by_ids(["y"])[0].page_content == texts[1]
    assert store.get_by_ids(["y"])[0].metadata == {"n": 1}


@pytest.mark.parametrize("use_async", [False, True])
async def test_delete_evicts(
    store: CacheBlendVectorStore, passages: Passages, was_warm: WasWarm, use_async: bool
) -> None:
    texts = passages(3)
    store.add_documents(_documents(texts), ids=["a", "b", "c"])
    _ = await store.adelete(["a", "c"]) if use_async else store.delete(["a", "c"])
    assert store.get_by_ids(["a", "c"]) == []
    assert was_warm(texts) == [False, True, False]


def test_text_is_evicted_with_its_last_document(
    store: CacheBlendVectorStore, passages: Passages, was_warm: WasWarm, engine: Engine
) -> None:
    texts = passages(1)
    store.add_texts(texts * 3, ids=["a", "b", "c"])
    store.delete(["a"])
    assert engine.warm(texts).already_there == 1
    store.delete(["b", "c"])
    assert was_warm(texts) == [False]


def test_replaced_text_no_longer_holds_a_chunk(engine: Engine, passages: Passages, was_warm: WasWarm) -> None:
    store = CacheBlendVectorStore(InMemoryVectorStore(EMBEDDING), engine)
    old, new = passages(2)
    store.add_texts([old], ids=["a"])
    store.add_texts([old], ids=["b"])
    store.add_texts([new], ids=["a"])
    store.delete(["b"])
    assert was_warm([old, new]) == [False, True]


async def _add(store: CacheBlendVectorStore, method: str, texts: list[str], ids: list[str]) -> None:
    """By the ids of documents, or by those given."""
    if "documents" in method:
        added = getattr(store, method)([Document(text, id=id_) for text, id_ in zip(texts, ids, strict=True)])
    else:
        added = getattr(store, method)(texts, ids=ids)
    assert (await added if method.startswith("aadd") else added) == ids


@pytest.mark.parametrize("method", ADDS)
async def test_a_replaced_document_is_evicted_with_the_last_that_holds_its_text(
    engine: Engine, passages: Passages, was_warm: WasWarm, method: str
) -> None:
    store = CacheBlendVectorStore(InMemoryVectorStore(EMBEDDING), engine)
    old, shared, kept, new, newer = texts = [text[:60] for text in passages(5)]
    await _add(store, method, [old, shared, shared, kept], ["a", "b", "c", "d"])
    await _add(store, method, [new, newer, kept], ["a", "b", "d"])
    assert engine.is_warm(texts) == [False, True, True, True, True]
    await _add(store, method, [newer, kept, new], ["a", "b", "d"])  # texts that change places stay
    assert engine.is_warm(texts) == [False, True, True, True, True]
    restarted = CacheBlendVectorStore(store.vectorstore, engine)
    await _add(restarted, method, [old], ["c"])
    assert was_warm(texts) == [True, False, True, True, True]


@pytest.mark.parametrize("method", ADDS)
async def test_a_failed_warm_evicts_nothing(
    engine: Engine,
    passages: Passages,
    was_warm: WasWarm,
    while_disk_is_full: Callable[[], AbstractContextManager[None]],
    method: str,
) -> None:
    store = CacheBlendVectorStore(InMemoryVectorStore(EMBEDDING), engine)
    old, new = passages(2)
    await _add(store, method, [old], ["a"])
    with while_disk_is_full(), pytest.raises(StoreError):
        await _add(store, method, [new], ["a"])
    assert store.get_by_ids(["a"])[0].page_content == old
    assert was_warm([old, new]) == [True, False]


@pytest.mark.parametrize("use_async", [False, True])
async def test_a_store_that_its_first_document_makes(
    engine: Engine, passages: Passages, was_warm: WasWarm, caplog: pytest.LogCaptureFixture, use_async: bool
) -> None:
    class Lazy(InMemoryVectorStore):
        def get_by_ids(self, ids: Any, /) -> list[Document]:
            if not self.store:
                raise LookupError("no such collection")
            return super().get_by_ids(ids)

        async def aget_by_ids(self, ids: Any, /) -> list[Document]:
            return self.get_by_ids(ids)

    store = CacheBlendVectorStore(Lazy(EMBEDDING), engine)
    texts = passages(2)
    for text in texts:
        await _add(store, "aadd_texts" if use_async else "add_texts", [text], ["a"])
    assert was_warm(texts) == [False, True]
    assert caplog.text.count("no such collection") == 1


def test_failed_delete_leaves_the_index(store: CacheBlendVectorStore, passages: Passages) -> None:
    store.add_texts(passages(2), ids=["a", "b"])
    if isinstance(store.vectorstore, FAISS):
        with pytest.raises(ValueError, match="missing"):
            store.delete(["a", "missing"])
        assert len(store.get_by_ids(["a", "b"])) == 2
    else:
        store.delete(["a", "missing"])
        assert len(store.get_by_ids(["a", "b"])) == 1


def test_store_without_lookup_by_id(
    engine: Engine, passages: Passages, was_warm: WasWarm, caplog: pytest.LogCaptureFixture
) -> None:
    class WithoutLookup(InMemoryVectorStore):
        get_by_ids = VectorStore.get_by_ids

    store = CacheBlendVectorStore(WithoutLookup(EMBEDDING), engine)
    texts = passages(1)
    store.add_texts(texts, ids=["a"])
    store.delete(["a"])
    assert store.similarity_search(texts[0]) == []
    assert was_warm(texts) == [True]
    assert "get_by_ids" in caplog.text


@pytest.mark.parametrize("use_async", [False, True])
async def test_too_long_document_leaves_index_and_chunks(
    store: CacheBlendVectorStore, engine: Engine, passages: Passages, was_warm: WasWarm, use_async: bool
) -> None:
    (text,) = passages(1)
    documents = _documents([text, "word " * engine.context_window])
    with pytest.raises(ChunkTooLongError):
        _ = await store.aadd_documents(documents) if use_async else store.add_documents(documents)
    assert store.similarity_search(text) == []
    assert was_warm([text]) == [False]


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("method", ADDS)
async def test_full_disk_leaves_the_index(store: CacheBlendVectorStore, passages: Passages, method: str) -> None:
    texts = passages(2)
    with pytest.raises(StoreError):
        added = getattr(store, method)(_documents(texts) if "documents" in method else texts)
        await added
    assert store.similarity_search(texts[0]) == []


def test_failing_index_leaves_warm_chunks_only(engine: Engine, passages: Passages, was_warm: WasWarm) -> None:
    store = CacheBlendVectorStore(_faiss(), engine)
    texts = passages(2)
    with pytest.raises(ValueError, match="Duplicate"):
        store.add_texts(texts, ids=["same", "same"])
    assert store.similarity_search(texts[0]) == []
    assert was_warm(texts) == [True, True]


async def test_event_loop_is_not_blocked(
    index: VectorStore, real_chat_engine: Engine, passages: Passages, assert_loop_runs: AssertLoopRuns
) -> None:
    store = CacheBlendVectorStore(index, real_chat_engine)
    await assert_loop_runs(store.aadd_documents(_documents(passages(3))))
    await assert_loop_runs(store.aadd_texts(passages(3)))


@pytest.mark.parametrize("vectorstore_cls", [InMemoryVectorStore, FAISS])
async def test_built_from_texts_and_documents(
    engine: Engine, passages: Passages, was_warm: WasWarm, vectorstore_cls: type[VectorStore]
) -> None:
    texts = passages(4)
    how: Any = {"vectorstore_cls": vectorstore_cls, "engine": engine}
    stores = [
        CacheBlendVectorStore.from_texts(texts[:1], EMBEDDING, [{"n": 0}], ids=["a"], **how),
        await CacheBlendVectorStore.afrom_texts(texts[1:2], EMBEDDING, [{"n": 1}], ids=["a"], **how),
        CacheBlendVectorStore.from_documents([Document(texts[2], id="a", metadata={"n": 2})], EMBEDDING, **how),
        await CacheBlendVectorStore.afrom_documents([Document(texts[3], id="a", metadata={"n": 3})], EMBEDDING, **how),
    ]
    for n, store in enumerate(stores):
        assert isinstance(store.vectorstore, vectorstore_cls)
        assert store.get_by_ids(["a"]) == [Document(texts[n], id="a", metadata={"n": n})]
    stores[0].delete(["a"])
    assert was_warm(texts) == [False, True, True, True]


async def test_searches_are_the_wrapped_stores(store: CacheBlendVectorStore, passages: Passages) -> None:
    texts = passages(5)
    store.add_texts(texts)
    vector = EMBEDDING.embed_query(texts[2])
    searches = {
        "similarity_search": (texts[2],),
        "similarity_search_with_score": (texts[2],),
        "similarity_search_by_vector": (vector,),
        "max_marginal_relevance_search": (texts[2],),
        "max_marginal_relevance_search_by_vector": (vector,),
        "search": (texts[2], "mmr"),
    }
    if isinstance(store.vectorstore, FAISS):  # the other one has no relevance scores
        store.vectorstore.override_relevance_score_fn = lambda distance: 1 / (1 + distance)
        searches["similarity_search_with_relevance_scores"] = (texts[2],)
    for name, arguments in searches.items():
        expected = getattr(store.vectorstore, name)(*arguments, k=2)
        assert len(expected) == 2
        assert getattr(store, name)(*arguments, k=2) == expected
        assert await getattr(store, "a" + name)(*arguments, k=2) == expected
    assert store.embeddings is EMBEDDING


async def test_search_types_of_the_wrapped_class(engine: Engine) -> None:
    class Hybrid(InMemoryVectorStore):
        def search(self, query: str, search_type: str, **kwargs: Any) -> list[Document]:
            return [Document(f"{search_type} {query}")]

        async def asearch(self, query: str, search_type: str, **kwargs: Any) -> list[Document]:
            return self.search(query, search_type)

    store = CacheBlendVectorStore(Hybrid(EMBEDDING), engine)
    assert store.search("query", "hybrid") == await store.asearch("query", "hybrid") == [Document("hybrid query")]


async def test_retriever_is_over_the_wrapper(
    store: CacheBlendVectorStore, passages: Passages, was_warm: WasWarm
) -> None:
    texts = passages(2)
    retriever = store.as_retriever(search_kwargs={"k": 1})
    assert retriever.vectorstore is store
    retriever.add_documents(_documents(texts))
    assert [document.page_content for document in retriever.invoke(texts[1])] == [texts[1]]
    assert [document.page_content for document in await retriever.ainvoke(texts[0])] == [texts[0]]
    assert was_warm(texts) == [True, True]


def test_attributes_of_the_wrapped_class(engine: Engine, passages: Passages, tmp_path: Path) -> None:
    store = CacheBlendVectorStore(_faiss(), engine)
    texts = passages(1)
    store.add_texts(texts, ids=["a"])
    store.save_local(str(tmp_path))
    loaded = FAISS.load_local(str(tmp_path), EMBEDDING, allow_dangerous_deserialization=True)
    assert CacheBlendVectorStore(loaded, engine).get_by_ids(["a"])[0].page_content == texts[0]
    assert store.index.ntotal == 1
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = store.no_such_thing


def test_adds_from_several_threads(engine: Engine, passages: Passages, was_warm: WasWarm) -> None:
    store = CacheBlendVectorStore(InMemoryVectorStore(EMBEDDING), engine)
    texts = passages(4)

    async def add_all() -> None:
        await asyncio.gather(*(asyncio.to_thread(store.add_texts, [text]) for text in texts))

    asyncio.run(add_all())
    assert len(store.similarity_search("note", k=9)) == 4
    assert was_warm(texts) == [True] * 4
