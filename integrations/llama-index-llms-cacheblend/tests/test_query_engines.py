"""Whole applications over FAISS: how much of what the model reads is reused in each."""

from typing import Any, Literal

import pytest
from cacheblend_rag import load_engine
from cacheblend_rag.engines.base import Engine
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_selector import SingleSelection
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent, LLMCompletionEndEvent
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import CompactAndRefine
from llama_index.core.schema import MetadataMode, QueryBundle, TextNode
from llama_index.core.selectors import PydanticSingleSelector
from llama_index.core.selectors.prompts import DEFAULT_SINGLE_PYD_SELECT_PROMPT_TMPL
from llama_index.core.tools import QueryEngineTool, ToolMetadata
from pydantic import BaseModel

from llama_index.llms.cacheblend import CacheBlendLLM, CacheBlendPostprocessor, CacheBlendTransform

QUESTION = "Which harbour lamp was painted?"


@pytest.fixture
def llm(engine: Engine) -> CacheBlendLLM:
    return CacheBlendLLM(engine=engine, max_tokens=2)


@pytest.fixture
def index(engine: Engine, faiss_index: Any, passages: Any, embedding: Any) -> VectorStoreIndex:
    """Three warm passages, with a title each, and white space that compact prompts strip."""
    nodes = [TextNode(text=f"{text}\n ", metadata={"title": f"Part {n}"}) for n, text in enumerate(passages(3))]
    pipeline = IngestionPipeline(transformations=[CacheBlendTransform(engine=engine), embedding])
    return faiss_index(pipeline.run(nodes=nodes))


def _held(engine: Engine, index: VectorStoreIndex) -> int:
    """Tokens in all passages."""
    texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in index.docstore.docs.values()]
    return sum(map(engine.count_tokens, texts))


def _covered(response: Any) -> int:
    stats = response.additional_kwargs["stats"]
    return int(stats["reused_tokens"] + stats["recomputed_tokens"])


def _responses(recorder: Any) -> list[Any]:
    return [event.response for event in recorder.of(LLMChatEndEvent)]


@pytest.mark.parametrize(
    ("mode", "reads", "use_async"),
    [
        ("compact", 1, False),
        ("compact", 1, True),
        ("refine", 3, False),
        ("tree_summarize", 1, False),
        ("simple_summarize", 1, False),
    ],
)
async def test_response_modes(
    llm: CacheBlendLLM, engine: Engine, index: VectorStoreIndex, recorder: Any, mode: str, reads: int, use_async: bool
) -> None:
    query_engine = index.as_query_engine(
        llm=llm,
        response_mode=mode,
        similarity_top_k=3,
        node_postprocessors=[CacheBlendPostprocessor(engine=engine)],
    )
    response = await query_engine.aquery(QUESTION) if use_async else query_engine.query(QUESTION)
    assert str(response)
    responses = _responses(recorder)
    assert len(responses) == reads
    assert all(reused > 0 for reused in recorder.reused())
    assert sum(map(_covered, responses)) >= 0.8 * _held(engine, index)  # not the edges


def test_repacked_text_still_matches(
    llm: CacheBlendLLM, engine: Engine, index: VectorStoreIndex, recorder: Any
) -> None:
    """Compact prompts join passages, strip them and cut where the context ends: through a passage, here."""
    helper = PromptHelper(
        context_window=8192, num_output=2, chunk_overlap_ratio=0.0, tokenizer=llm.tokenizer, chunk_size_limit=110
    )
    synthesizer = CompactAndRefine(llm=llm, prompt_helper=helper)
    nodes = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)
    synthesizer.synthesize(QUESTION, nodes=nodes)
    responses = _responses(recorder)
    assert len(responses) == 2
    assert all(reused > 0 for reused in recorder.reused())
    assert sum(map(_covered, responses)) >= 0.6 * _held(engine, index)


def test_streaming_query(llm: CacheBlendLLM, index: VectorStoreIndex, recorder: Any) -> None:
    response = index.as_query_engine(llm=llm, streaming=True).query(QUESTION)
    assert "".join(response.response_gen)
    assert recorder.reused()[0] > 0


def test_cold_nodes_are_reused_the_second_time(
    llm: CacheBlendLLM, engine: Engine, faiss_index: Any, passages: Any, recorder: Any
) -> None:
    index = faiss_index([TextNode(text=text) for text in passages(2)])
    for processors in ([], [CacheBlendPostprocessor(engine=engine)]):
        index.as_query_engine(llm=llm, node_postprocessors=processors).query(QUESTION)
    before, after = recorder.reused()
    assert before == 0 < after


@pytest.mark.parametrize(("mode", "use_async"), [("context", False), ("condense_plus_context", True)])
async def test_chat_engines(
    llm: CacheBlendLLM, index: VectorStoreIndex, recorder: Any, mode: Any, use_async: bool
) -> None:
    chat_engine = index.as_chat_engine(chat_mode=mode, llm=llm, similarity_top_k=2)
    history = [ChatMessage("Hello."), ChatMessage("Hi.", role=MessageRole.ASSISTANT)]
    if use_async:
        streaming = await chat_engine.astream_chat(QUESTION, chat_history=history)
        assert "".join([token async for token in streaming.async_response_gen()])
    else:
        assert str(chat_engine.chat(QUESTION, chat_history=history))
    assert len(recorder.of(LLMCompletionEndEvent)) == (1 if mode == "condense_plus_context" else 0)
    (answer,) = recorder.reused()
    assert answer > 0


class Choice(SingleSelection):
    """A choice of the one that fits best."""

    index: Literal[1, 2]
    reason: Literal["it fits"]


def _tools(llm: CacheBlendLLM, index: VectorStoreIndex) -> list[QueryEngineTool]:
    query_engine = index.as_query_engine(llm=llm, similarity_top_k=2)
    return [
        QueryEngineTool(query_engine, metadata=ToolMetadata(name=name, description=f"Notes on {name}s."))
        for name in ("harbour", "orchard")
    ]


async def test_router(llm: CacheBlendLLM, engine: Engine, index: VectorStoreIndex, recorder: Any) -> None:
    chooser = CacheBlendLLM(engine=engine, max_tokens=64)
    program = FunctionCallingProgram.from_defaults(
        Choice, prompt_template_str=DEFAULT_SINGLE_PYD_SELECT_PROMPT_TMPL, llm=chooser
    )
    router = RouterQueryEngine(PydanticSingleSelector(program), _tools(llm, index), llm=llm)
    response = await router.aquery(QUESTION)
    assert response.metadata["selector_result"].ind in (0, 1)
    assert recorder.reused()[1] > 0


class Questions(BaseModel):
    """Two questions."""

    about_lamps: Literal["Which lamp?", "Which harbour?"]
    about_trees: Literal["Which orchard?", "Which cedar?"]


class Generator(BaseQuestionGenerator):
    """Asks a model for what it can't fail to give."""

    llm: CacheBlendLLM

    def __init__(self, llm: CacheBlendLLM) -> None:
        self.llm = llm

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None: ...

    def generate(self, tools: Any, query: QueryBundle) -> list[SubQuestion]:
        questions = self.llm.structured_predict(Questions, PromptTemplate("Split: {query}"), query=query.query_str)
        lamps, trees = questions.about_lamps, questions.about_trees
        return [
            SubQuestion(sub_question=lamps, tool_name="harbour"),
            SubQuestion(sub_question=trees, tool_name="orchard"),
        ]

    async def agenerate(self, tools: Any, query: QueryBundle) -> list[SubQuestion]:
        return self.generate(tools, query)


def test_sub_questions(llm: CacheBlendLLM, engine: Engine, index: VectorStoreIndex, recorder: Any) -> None:
    generator = Generator(CacheBlendLLM(engine=engine, max_tokens=64))
    query_engine = SubQuestionQueryEngine.from_defaults(
        _tools(llm, index), llm=llm, question_gen=generator, use_async=False, verbose=False
    )
    assert str(query_engine.query(QUESTION))
    _, lamps, trees, _ = recorder.reused()
    assert lamps > 0
    assert trees > 0


@pytest.mark.slow
def test_router_of_a_capable_model(
    tool_model: str, faiss_index: Any, passages: Any, recorder: Any, tmp_path: Any
) -> None:
    """LlamaIndex's own selector, nothing bounded."""
    engine = load_engine(tool_model, store=tmp_path)
    llm = CacheBlendLLM(engine=engine, blend={"mode": "blend", "min_reused_tokens": 0}, max_tokens=128)
    nodes = [TextNode(text=text) for text in passages(2)]
    CacheBlendTransform(engine=engine)(nodes)
    router = RouterQueryEngine.from_defaults(
        _tools(llm, faiss_index(nodes)), llm=llm, selector=PydanticSingleSelector.from_defaults(llm=llm)
    )
    router.query(QUESTION)
    assert recorder.reused()[-1] > 0
    engine.close()
