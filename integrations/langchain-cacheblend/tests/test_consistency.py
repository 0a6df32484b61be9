"""Comparing an index with the chunk store, and making them agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from langchain_cacheblend import CacheBlendLLM, CacheBlendVectorStore
from langchain_cacheblend.consistency import RepairReport, VerifyReport

Passages = Callable[[int], list[str]]
EMBEDDING = DeterministicFakeEmbedding(size=16)
both = pytest.mark.parametrize("use_async", [False, True], ids=["sync", "async"])
every_store = pytest.mark.parametrize(
    ("make_index", "use_async"),
    [("memory", False), ("memory", True), ("faiss", False), ("qdrant", True)],
    indirect=["make_index"],
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def own(model_path: str, directory: Path) -> Iterator[Engine]:
    """An engine whose chunk store no other test uses: what others leave there would count as unknown."""
    blend = {"mode": "blend", "min_reused_tokens": 0}
    llm = CacheBlendLLM(model=model_path, store=directory, dtype="float32", blend=blend)
    yield llm.engine
    llm.engine.close()


@pytest.fixture
def engine(own: Engine) -> Iterator[Engine]:
    """Nothing is warm to begin with."""
    yield own
    own.evict_keys(list(own.stored_keys()))


async def _verify(store: CacheBlendVectorStore, use_async: bool, *args: Any, **kwargs: Any) -> VerifyReport:
    return await store.averify(*args, **kwargs) if use_async else store.verify(*args, **kwargs)


async def _repair(store: CacheBlendVectorStore, use_async: bool, *args: Any, **kwargs: Any) -> RepairReport:
    return await store.arepair(*args, **kwargs) if use_async else store.repair(*args, **kwargs)


def _texts(documents: list[Document]) -> set[str]:
    return {document.page_content for document in documents}


class Opaque(VectorStore):
    """As little as a vector store can be."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def add_texts(self, texts: Any, metadatas: Any = None, **kwargs: Any) -> list[str]:
        ids = [str(len(self._texts) + n) for n, _ in enumerate(texts)]
        self._texts.update(zip(ids, texts, strict=True))
        return ids

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        raise NotImplementedError

    @classmethod
    def from_texts(cls, *args: Any, **kwargs: Any) -> VectorStore:
        raise NotImplementedError


class ChromaLike(Opaque):
    def get(self, ids: Any = None, include: Any = ("documents", "metadatas")) -> dict[str, Any]:
        given = {"documents": list(self._texts.values()), "metadatas": [None] * len(self._texts)}
        return {"ids": list(self._texts), **{name: given[name] for name in include}}


@every_store
async def test_both_directions(
    make_index: Callable[[Embeddings], VectorStore],
    engine: Engine,
    passages: Passages,
    monkeypatch: pytest.MonkeyPatch,
    use_async: bool,
) -> None:
    monkeypatch.setattr("langchain_cacheblend.listing._PAGE", 2)
    warm, cold, unknown = passages(2), passages(2), passages(1)
    store = CacheBlendVectorStore(make_index(EMBEDDING), engine)
    assert await _verify(store, use_async) == VerifyReport(0, [], [])
    store.add_texts(warm)
    store.vectorstore.add_texts([*cold, cold[0]])  # past the wrapper, as if before CacheBlend came
    engine.warm(unknown)
    report = await _verify(store, use_async)
    assert report.documents == 5
    assert (len(report.cold), _texts(report.cold)) == (3, set(cold))
    assert report.unknown == engine.chunk_keys(unknown)
    assert all(document.id or document.metadata["_id"] for document in report.cold)

    repaired = await _repair(store, use_async)
    assert (repaired.documents, repaired.cold, repaired.unknown) == (5, report.cold, report.unknown)
    assert (repaired.warmed.stored, repaired.too_long, repaired.evicted) == (2, [], 0)
    assert engine.is_warm([*warm, *cold, *unknown]) == [True] * 5
    assert await _verify(store, use_async) == VerifyReport(5, [], report.unknown)

    assert (await _repair(store, use_async, evict_unknown=True)).evicted == 1
    assert engine.is_warm([*warm, *cold, *unknown]) == [True] * 4 + [False]
    assert await _verify(store, use_async) == VerifyReport(5, [], [])


@every_store
async def test_documents_and_ids_in_place_of_a_list(
    make_index: Callable[[Embeddings], VectorStore],
    engine: Engine,
    passages: Passages,
    monkeypatch: pytest.MonkeyPatch,
    use_async: bool,
) -> None:
    monkeypatch.setattr("langchain_cacheblend.vectorstores._IDS_AT_ONCE", 2)
    texts = passages(3)
    store = CacheBlendVectorStore(make_index(EMBEDDING), engine)
    records = InMemoryRecordManager(namespace="notes")
    index(map(Document, texts), records, store, key_encoder="sha1")
    engine.evict(texts[:1])
    for report in (
        await _verify(store, use_async, ids=records.list_keys()),
        await _verify(store, use_async, documents=map(Document, texts)),
        await _verify(store, use_async),
    ):
        assert (report.documents, _texts(report.cold), report.unknown) == (3, {texts[0]}, [])
    some = await _verify(store, use_async, ids=iter(records.list_keys()[:2]))
    assert (some.documents, len(some.unknown)) == (2, 1)
    repaired = await _repair(store, use_async, ids=records.list_keys())
    assert (_texts(repaired.cold), repaired.warmed.stored) == ({texts[0]}, 1)


@both
async def test_stores_like_chroma(engine: Engine, passages: Passages, use_async: bool) -> None:
    warm, cold = passages(2)
    store = CacheBlendVectorStore(ChromaLike(), engine)
    store.add_texts([warm])
    store.vectorstore.add_texts([cold])
    assert await _verify(store, use_async) == VerifyReport(2, [Document(cold, id="1")], [])


@both
async def test_what_can_not_be_listed_is_one_clear_error(engine: Engine, use_async: bool) -> None:
    store = CacheBlendVectorStore(Opaque(), engine)
    with pytest.raises(ConfigError, match=r"Opaque can't list its documents: pass ids, such as record_manager"):
        await _verify(store, use_async)
    with pytest.raises(ConfigError, match="Opaque has no get_by_ids: pass documents"):
        await _repair(store, use_async, ids=["a"])
    with pytest.raises(ConfigError, match="not both"):
        await _verify(store, use_async, documents=[], ids=[])
    assert await _verify(store, use_async, documents=[]) == VerifyReport(0, [], [])


def test_empty_and_too_long_documents(engine: Engine, passages: Passages) -> None:
    """What can't be warmed is told, and keeps nothing else cold."""
    texts = passages(3)
    long = "word " * engine.context_window
    store = CacheBlendVectorStore(InMemoryVectorStore.from_texts([texts[0], "", long, *texts[1:]], EMBEDDING), engine)
    report = store.repair()
    assert _texts(report.cold) == {*texts, long}
    assert (report.warmed.stored, _texts(report.too_long)) == (3, {long})
    assert report.warmed.tokens == sum(map(engine.count_tokens, texts))
    assert _texts(store.verify().cold) == {long}


def test_a_lost_file_is_found(engine: Engine, passages: Passages, directory: Path) -> None:
    texts = passages(2)
    store = CacheBlendVectorStore(InMemoryVectorStore(EMBEDDING), engine)
    store.add_texts(texts)
    (key,) = engine.chunk_keys(texts[:1])
    next(directory.rglob(f"{key}.safetensors")).unlink()
    assert _texts(store.repair().cold) == {texts[0]}
    assert store.verify() == VerifyReport(2, [], [])


def test_after_a_restart(engine: Engine, passages: Passages) -> None:
    """A new object does not know which documents hold a text: one that is still held may become cold, and is a miss."""
    shared, other = passages(2)
    index = InMemoryVectorStore(EMBEDDING)
    CacheBlendVectorStore(index, engine).add_texts([shared, shared, other], ids=["a", "b", "c"])
    prompt = f"Notes:\n\n{other}\n\n{shared}\n\nSummary:"
    restarted = CacheBlendVectorStore(index, engine)
    restarted.delete(["a"])
    assert engine.is_warm([shared, other]) == [False, True]
    stats = engine.generate(prompt, max_tokens=1, blend={"recompute_ratio": 1.0}).stats
    assert (stats.segments, stats.faults) == (1, 0)
    assert stats.missed_tokens >= engine.count_tokens(shared) - 2
    assert restarted.verify() == VerifyReport(2, [Document(shared, id="b")], [])
    restarted.repair()
    assert engine.generate(prompt, max_tokens=1).stats.segments == 2
