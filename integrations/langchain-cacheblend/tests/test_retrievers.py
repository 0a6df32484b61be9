from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.stats import BlendStats
from cacheblend_rag.store import MemoryStore
from langchain_classic.retrievers import (
    ContextualCompressionRetriever,
    EnsembleRetriever,
    ParentDocumentRetriever,
)
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_core.stores import InMemoryStore
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import RetrieversIntegrationTests
from langchain_text_splitters import RecursiveCharacterTextSplitter

from langchain_cacheblend import CacheBlendLLM, CacheBlendRetriever, CacheBlendVectorStore

Passages = Callable[[int], list[str]]
AssertLoopRuns = Callable[[Awaitable[object]], Awaitable[None]]
WasWarm = Callable[[list[str]], list[bool]]
both = pytest.mark.parametrize("use_async", [False, True])


@pytest.fixture
def texts(passages: Passages) -> list[str]:
    return passages(3)


@pytest.fixture
def cold(texts: list[str]) -> InMemoryVectorStore:
    """An index that knows nothing of CacheBlend."""
    return InMemoryVectorStore.from_texts(texts, DeterministicFakeEmbedding(size=16))


async def _retrieve(
    retriever: CacheBlendRetriever, query: str, use_async: bool, *args: Any, **kw: Any
) -> list[Document]:
    return await retriever.ainvoke(query, *args, **kw) if use_async else retriever.invoke(query, *args, **kw)


@both
async def test_cold_documents_are_warmed(
    engine: Engine, cold: InMemoryVectorStore, texts: list[str], was_warm: WasWarm, use_async: bool
) -> None:
    wrapped = cold.as_retriever(search_kwargs={"k": 2})
    found = await _retrieve(CacheBlendRetriever(retriever=wrapped, engine=engine), "query", use_async)
    assert found == wrapped.invoke("query")
    returned = {document.page_content for document in found}
    assert len(returned) == 2
    assert was_warm(texts) == [text in returned for text in texts]


@both
async def test_misses_can_be_ignored(
    engine: Engine, cold: InMemoryVectorStore, texts: list[str], was_warm: WasWarm, use_async: bool
) -> None:
    retriever = CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine, on_miss="ignore")
    assert len(await _retrieve(retriever, "query", use_async)) == 3
    assert was_warm(texts) == [False] * 3


@both
async def test_the_best_can_come_last(engine: Engine, cold: InMemoryVectorStore, use_async: bool) -> None:
    wrapped = cold.as_retriever()
    retriever = CacheBlendRetriever(retriever=wrapped, engine=engine, best_last=True)
    assert await _retrieve(retriever, "query", use_async) == wrapped.invoke("query")[::-1]


@both
@pytest.mark.usefixtures("full_disk")
async def test_failing_warm_does_not_break_retrieval(
    engine: Engine, cold: InMemoryVectorStore, caplog: pytest.LogCaptureFixture, use_async: bool
) -> None:
    retriever = CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine)
    assert await _retrieve(retriever, "query", use_async) == cold.as_retriever().invoke("query")
    (record,) = [record for record in caplog.records if record.name.startswith("langchain_cacheblend")]
    assert record.levelname == "WARNING"
    assert "cold" in record.getMessage()


@both
async def test_failing_retrieval_is_not_hidden(engine: Engine, use_async: bool) -> None:
    def fail(query: str) -> list[Document]:
        raise TimeoutError(query)

    with pytest.raises(TimeoutError):
        await _retrieve(CacheBlendRetriever(retriever=RunnableLambda(fail), engine=engine), "query", use_async)


@both
async def test_config_and_arguments_reach_the_wrapped_retriever(
    engine: Engine, cold: InMemoryVectorStore, use_async: bool
) -> None:
    configurable = cold.as_retriever().configurable_fields(search_kwargs=ConfigurableField(id="search"))
    retriever = CacheBlendRetriever(retriever=configurable, engine=engine)
    config: Any = {"configurable": {"search": {"k": 1}}}
    assert len(await _retrieve(retriever, "query", use_async, config)) == 1
    plain = CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine)
    assert len(await _retrieve(plain, "query", use_async, k=2)) == 2


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.starts: list[tuple[str, UUID, UUID | None, list[str]]] = []
        self.ends: list[list[Document]] = []

    def on_retriever_start(
        self, serialized: Any, query: str, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        self.starts.append((kwargs["name"], run_id, parent_run_id, sorted(kwargs["tags"])))

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        self.ends.append(documents)


@both
async def test_callbacks_see_both_retrievers(engine: Engine, cold: InMemoryVectorStore, use_async: bool) -> None:
    recorder = Recorder()
    retriever = CacheBlendRetriever(retriever=cold.as_retriever(tags=["inner"]), engine=engine)
    config: Any = {"callbacks": [recorder], "tags": ["request"], "run_name": "mine"}
    found = await _retrieve(retriever, "query", use_async, config)
    (outer, outer_id, no_parent, outer_tags), (inner, _, parent, inner_tags) = recorder.starts
    assert (outer, no_parent, outer_tags) == ("mine", None, ["request"])
    assert (inner, parent, inner_tags) == ("VectorStoreRetriever", outer_id, ["inner", "request"])
    assert recorder.ends == [found, found]


class TestStandard(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _index(self, engine: Engine, cold: InMemoryVectorStore) -> None:
        self._engine, self._cold = engine, cold

    @property
    def retriever_constructor(self) -> Any:
        """How many documents there are is for the wrapped retriever to say."""

        def make(**search: Any) -> CacheBlendRetriever:
            return CacheBlendRetriever(retriever=self._cold.as_retriever(search_kwargs=search), engine=self._engine)

        return make

    @property
    def retriever_query_example(self) -> str:
        return "what is in the harbour?"


def _memory(engine: Engine) -> MemoryStore:
    return engine.library.store.memory


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)


@both
@pytest.mark.parametrize("prefetch", [True, False])
async def test_warm_documents_come_to_memory(
    engine: Engine, cold: InMemoryVectorStore, texts: list[str], use_async: bool, prefetch: bool
) -> None:
    engine.warm(texts[:2])
    _memory(engine).close()  # as after a restart
    keys = engine.chunk_keys(texts)
    retriever = CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine, on_miss="ignore", prefetch=prefetch)
    assert len(await _retrieve(retriever, "query", use_async)) == 3
    if prefetch:
        _wait_until(lambda: all(key in _memory(engine) for key in keys[:2]))
    assert [key in _memory(engine) for key in keys] == [prefetch, prefetch, False]
    assert engine.is_warm(texts) == [True, True, False]


def test_failing_prefetch_does_not_break_retrieval(
    engine: Engine, cold: InMemoryVectorStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(chunks: list[str]) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine, "prefetch", fail)
    retriever = CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine)
    assert len(retriever.invoke("query")) == 3
    assert "can't start new thread" in caplog.text


def test_one_document_that_is_too_long_keeps_no_other_cold(
    engine: Engine, cold: InMemoryVectorStore, texts: list[str], was_warm: WasWarm, caplog: pytest.LogCaptureFixture
) -> None:
    cold.add_texts(["word " * engine.context_window])
    assert len(CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine).invoke("query")) == 4
    assert was_warm(texts) == [True] * 3
    assert "1 documents stay cold" in caplog.text


def _stats(engine: Engine, documents: list[Document]) -> BlendStats:
    """How a prompt made of some documents is read."""
    notes = "\n\n".join(f"[{n}] {document.page_content}" for n, document in enumerate(documents))
    return engine.generate(f"Read the notes.\n\n{notes}\n\nQuestion: why?\nAnswer:", max_tokens=1).stats


def test_ensemble(engine: Engine, cold: InMemoryVectorStore, passages: Passages) -> None:
    other = InMemoryVectorStore.from_texts(passages(2), DeterministicFakeEmbedding(size=8))
    ensemble = EnsembleRetriever(retrievers=[cold.as_retriever(), other.as_retriever()], weights=[0.5, 0.5])
    found = CacheBlendRetriever(retriever=ensemble, engine=engine).invoke("query")
    assert len(found) == 5
    assert _stats(engine, found).segments == 5


def test_parents_are_what_is_warmed(engine: Engine, passages: Passages) -> None:
    parents = [" ".join(passages(2)) for _ in range(2)]
    small = RecursiveCharacterTextSplitter(chunk_size=80, chunk_overlap=0)
    children = InMemoryVectorStore(DeterministicFakeEmbedding(size=16))
    retriever = ParentDocumentRetriever(vectorstore=children, docstore=InMemoryStore(), child_splitter=small)
    retriever.add_documents([Document(text) for text in parents])
    before = engine.stored_keys()
    found = CacheBlendRetriever(retriever=retriever, engine=engine).invoke(parents[0])
    assert {document.page_content for document in found} <= set(parents)
    assert engine.stored_keys() - before == set(engine.chunk_keys([document.page_content for document in found]))
    stats = _stats(engine, found)
    assert stats.segments == len(found)
    assert stats.reused_tokens + stats.recomputed_tokens > 0.8 * stats.prompt_tokens


class FirstAndLastWords(BaseDocumentCompressor):
    """Cuts the middle out of each document."""

    def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> list[Document]:
        words = [document.page_content.split(" ") for document in documents]
        return [Document(" ".join([*text[:30], "...", *text[-30:]])) for text in words]


def test_shortened_documents_reuse_what_is_left_of_them(engine: Engine, passages: Passages) -> None:
    texts = [" ".join(passages(3)) for _ in range(2)]
    cold = InMemoryVectorStore.from_texts(texts, DeterministicFakeEmbedding(size=16))
    whole = CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine)
    retriever = ContextualCompressionRetriever(base_compressor=FirstAndLastWords(), base_retriever=whole)
    before = engine.stored_keys()
    found = retriever.invoke("query")
    assert not {document.page_content for document in found} & set(texts)
    assert engine.stored_keys() - before == set(engine.chunk_keys(texts))  # no shortened text is stored
    stats = _stats(engine, found)
    assert stats.segments == 4  # two runs of each
    assert stats.reused_tokens + stats.recomputed_tokens > 0.7 * stats.prompt_tokens


async def test_event_loop_is_not_blocked(
    real_chat_engine: Engine, cold: InMemoryVectorStore, assert_loop_runs: AssertLoopRuns
) -> None:
    retriever = CacheBlendRetriever(retriever=cold.as_retriever(), engine=real_chat_engine)
    await assert_loop_runs(retriever.ainvoke("query"))


async def test_model_store_and_retriever_share_chunks(
    engine: Engine, cold: InMemoryVectorStore, passages: Passages
) -> None:
    """The whole of a RAG application: half of the documents were indexed before CacheBlend came."""
    store = CacheBlendVectorStore(cold, engine)
    store.add_texts(passages(3))
    llm = CacheBlendLLM(engine=engine, max_tokens=4)
    retriever = CacheBlendRetriever(retriever=store.as_retriever(search_kwargs={"k": 6}), engine=engine)

    def join(documents: list[Document]) -> str:
        return "\n\n".join(f"[{n}] {document.page_content}" for n, document in enumerate(documents))

    template = "Read the notes.\n\n{context}\n\nQuestion: {question}\nAnswer:"
    prompt = {"context": retriever | join, "question": RunnablePassthrough()} | PromptTemplate.from_template(template)
    chain = prompt | llm | StrOutputParser()

    text = chain.invoke("what is in the harbour?")
    info = llm.generate_prompt([prompt.invoke("what is in the harbour?")]).generations[0][0].generation_info
    assert info is not None
    assert info["stats"]["segments"] == 6
    assert info["stats"]["missed_tokens"] < 0.2 * info["stats"]["prompt_tokens"]
    assert await chain.ainvoke("what is in the harbour?") == text
    assert "".join(chain.stream("what is in the harbour?")) == text
