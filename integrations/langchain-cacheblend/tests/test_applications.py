"""What users build, unchanged but for the model and the store: chains, an agent, a graph."""

from __future__ import annotations

from collections.abc import Callable
from operator import add
from typing import Annotated, Any, TypedDict

import pytest
from cacheblend_rag.engines.base import Engine
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langchain_core.vectorstores import InMemoryVectorStore
from langgraph.graph import START, StateGraph
from pydantic import BaseModel, Field

from langchain_cacheblend import CacheBlendLLM, CacheBlendVectorStore, ChatCacheBlend

Passages = Callable[[int], list[str]]
LENGTH = 4


@pytest.fixture
def store(chat_engine: Engine, passages: Passages) -> CacheBlendVectorStore:
    documents = [Document(text, metadata={"title": f"Note {number}"}) for number, text in enumerate(passages(4))]
    return CacheBlendVectorStore.from_documents(
        documents, DeterministicFakeEmbedding(size=16), vectorstore_cls=InMemoryVectorStore, engine=chat_engine
    )


@pytest.fixture
def texts(store: CacheBlendVectorStore) -> list[str]:
    return [document.page_content for document in store.similarity_search("query", k=4)]


@pytest.fixture
def model(chat_engine: Engine) -> ChatCacheBlend:
    return ChatCacheBlend(engine=chat_engine, max_tokens=LENGTH)


class Collect(BaseCallbackHandler):
    """The reused tokens of each prompt."""

    def __init__(self) -> None:
        self.reused: list[int] = []

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        generation: Any = response.generations[0][0]
        message = getattr(generation, "message", None)
        stats = message.response_metadata["stats"] if message is not None else generation.generation_info["stats"]
        self.reused.append(stats["reused_tokens"])


def _enough(engine: Engine, texts: list[str]) -> int:
    """Half of the passages' tokens: the rest is recomputed, or lies at edges."""
    return sum(engine.count_tokens(text) for text in texts) // 2


def test_lcel(model: ChatCacheBlend, store: CacheBlendVectorStore, texts: list[str]) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Be short."), ("user", "{context}\n\n{question}")])
    joined = store.as_retriever(search_kwargs={"k": 4}) | (
        lambda documents: "\n\n".join(document.page_content for document in documents)
    )
    chain = {"context": joined, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()
    collect = Collect()
    answer = chain.invoke("What was counted?", config={"callbacks": [collect]})
    assert answer and collect.reused[0] > _enough(model.engine, texts)
    usage = UsageMetadataCallbackHandler()
    assert "".join(chain.stream("What was counted?", config={"callbacks": [usage]})) == answer
    details: Any = usage.usage_metadata[model.model]["input_token_details"]
    assert details["cache_read"] == collect.reused[0]


@pytest.mark.parametrize("kind", [ChatCacheBlend, CacheBlendLLM])
@pytest.mark.parametrize("separator", ["\n\n", "", " --- "])
def test_retrieval_chain(
    chat_engine: Engine,
    store: CacheBlendVectorStore,
    texts: list[str],
    kind: Callable[..., BaseLanguageModel[Any]],
    separator: str,
) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Use this:\n{context}"), ("user", "{input}")])
    documents = create_stuff_documents_chain(
        kind(engine=chat_engine, max_tokens=LENGTH),  # type: ignore[arg-type]
        prompt,
        document_prompt=PromptTemplate.from_template("<{title}> {page_content}"),
        document_separator=separator,
    )
    chain = create_retrieval_chain(store.as_retriever(search_kwargs={"k": 4}), documents)
    collect = Collect()
    result = chain.invoke({"input": "What was counted?"}, config={"callbacks": [collect]})
    assert result["answer"]
    assert {document.page_content for document in result["context"]} == set(texts)
    assert collect.reused[0] > _enough(chat_engine, texts)


class ShortQuery(BaseModel):
    """Input to the retriever; short, so that a very small model comes to an end."""

    query: str = Field(max_length=12)


@wrap_model_call
def search_first(request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
    """A very small model doesn't decide by itself to search."""
    has_searched = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice="none" if has_searched else "any"))


def test_agent(model: ChatCacheBlend, store: CacheBlendVectorStore, texts: list[str]) -> None:
    tool = create_retriever_tool(store.as_retriever(search_kwargs={"k": 4}), "search_notes", "Search the notes.")
    tool.args_schema = ShortQuery
    agent = create_agent(model.model_copy(update={"max_tokens": 40}), [tool], middleware=[search_first])
    result = agent.invoke({"messages": [HumanMessage("What was counted?")]})
    _, call, found, answer = result["messages"]
    assert isinstance(call, AIMessage) and call.tool_calls[0]["name"] == "search_notes"
    assert all(text in found.content for text in texts)
    assert isinstance(answer, AIMessage) and answer.content
    assert answer.response_metadata["stats"]["reused_tokens"] > _enough(model.engine, texts)


class State(TypedDict):
    """Of a graph: retrieve, then answer."""

    messages: Annotated[list[BaseMessage], add]
    documents: list[Document]


async def test_graph(model: ChatCacheBlend, store: CacheBlendVectorStore, texts: list[str]) -> None:
    retriever = store.as_retriever(search_kwargs={"k": 4})

    async def retrieve(state: State) -> dict[str, Any]:
        return {"documents": await retriever.ainvoke(str(state["messages"][-1].content))}

    async def answer(state: State) -> dict[str, Any]:
        context = "\n\n".join(document.page_content for document in state["documents"])
        return {"messages": [await model.ainvoke([HumanMessage(context), *state["messages"]])]}

    graph: Any = StateGraph(State)
    graph.add_sequence([("retrieve", retrieve), ("answer", answer)]).add_edge(START, "retrieve")
    app = graph.compile()
    question = {"messages": [HumanMessage("What was counted?")]}
    final = (await app.ainvoke(question))["messages"][-1]
    assert final.response_metadata["stats"]["reused_tokens"] > _enough(model.engine, texts)
    pieces = [
        message.content
        async for message, _ in app.astream(question, stream_mode="messages")
        if isinstance(message, AIMessageChunk)
    ]
    assert "".join(pieces) == final.content and len(pieces) > 2
