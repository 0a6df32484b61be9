from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
from cacheblend_rag.engines.base import Engine
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

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


async def test_event_loop_is_not_blocked(
    engine: Engine, cold: InMemoryVectorStore, assert_loop_runs: AssertLoopRuns
) -> None:
    await assert_loop_runs(CacheBlendRetriever(retriever=cold.as_retriever(), engine=engine).ainvoke("query"))


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
