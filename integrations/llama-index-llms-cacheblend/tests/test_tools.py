import asyncio
from typing import Any, Literal

import pytest
from cacheblend_rag import load_engine
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError
from llama_index.core.agent.workflow import AgentOutput, FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel

from llama_index.llms.cacheblend import CacheBlendLLM

# What the arguments may be is bounded, so that so small a model can't ramble.
Colour = Literal["red", "green"]


def paint(colour: Colour) -> str:
    """Paint the wall."""
    return f"painted {colour}"


def wash(colour: Colour) -> str:
    """Wash a car."""
    return f"washed {colour}"


class Wall(BaseModel):
    """A wall."""

    colour: Colour


PAINT, WASH = FunctionTool.from_defaults(paint), FunctionTool.from_defaults(wash)
TEMPLATE = PromptTemplate("Describe the {what} wall.")


@pytest.fixture
def engine(real_engine: Engine) -> Engine:
    """One that ends its calls."""
    return real_engine


@pytest.fixture
def llm(engine: Engine) -> CacheBlendLLM:
    return CacheBlendLLM(engine=engine, max_tokens=48)


def test_required_call(llm: CacheBlendLLM) -> None:
    response = llm.chat_with_tools([PAINT, WASH], "Paint it red.", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(response)
    assert call.tool_name in ("paint", "wash")
    assert call.tool_kwargs["colour"] in ("red", "green")
    assert call.tool_id
    (block,) = response.message.blocks
    assert isinstance(block, ToolCallBlock)
    assert response.additional_kwargs["finish_reason"] == "stop"


async def test_streamed_call(llm: CacheBlendLLM) -> None:
    arguments: Any = {"tools": [PAINT, WASH], "user_msg": "Paint it red.", "tool_choice": "wash"}
    responses: list[ChatResponse] = list(llm.stream_chat_with_tools(**arguments))
    so_far = [llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) for response in responses]
    (call,) = so_far[-1]
    assert call.tool_name == "wash"
    assert call.tool_kwargs["colour"] in ("red", "green")
    assert {calls[0].tool_id for calls in so_far if calls} == {call.tool_id}
    assert responses[-1].raw is not None
    *_, last = [response async for response in await llm.astream_chat_with_tools(**arguments)]
    assert llm.get_tool_calls_from_response(last)[0].tool_kwargs == call.tool_kwargs


async def test_predict_and_call(llm: CacheBlendLLM) -> None:
    response = await llm.apredict_and_call([PAINT], "Paint it red.", tool_required=True)
    assert response.response in ("painted red", "painted green")


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_was_cut_off_is_no_call(llm: CacheBlendLLM, stream: bool) -> None:
    arguments: Any = {"tools": [PAINT], "user_msg": "Paint it red.", "tool_choice": "paint", "max_tokens": 22}
    if stream:
        *partial, response = llm.stream_chat_with_tools(**arguments)
        assert any(llm.get_tool_calls_from_response(one, error_on_no_tool_call=False) for one in partial)
    else:
        response = llm.chat_with_tools(**arguments)
    assert response.raw is not None
    assert response.raw["finish_reason"] == "length"
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    assert response.message.content == response.raw["text"]


def test_no_call(llm: CacheBlendLLM) -> None:
    response = llm.chat_with_tools([PAINT], "Hello.", tool_choice="none", max_tokens=3)
    assert response.message.content
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="tool call"):
        llm.get_tool_calls_from_response(response)
    with pytest.raises(ConfigError, match="hammer"):
        llm.chat_with_tools([PAINT], "Hello.", tool_choice="hammer")
    with pytest.raises(ConfigError, match="tool_choice"):
        llm.chat_with_tools([PAINT], "Hello.", tool_choice={"kind": "paint"})


def test_calls_and_results_go_back_to_the_model(llm: CacheBlendLLM, engine: Engine) -> None:
    call = llm.chat_with_tools([PAINT], "Paint it.", tool_required=True)
    (selection,) = llm.get_tool_calls_from_response(call)
    result = ChatMessage("done", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": selection.tool_id})
    history = [ChatMessage("Paint it."), call.message, result]
    answer = llm.chat(history, max_tokens=3, tools=[PAINT.metadata.to_openai_tool()], tool_choice="none")
    function = {"name": "paint", "arguments": f'{{"colour": "{selection.tool_kwargs["colour"]}"}}'}
    rendered = engine.render_chat(
        [
            {"role": "user", "content": "Paint it."},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": selection.tool_id, "type": "function", "function": function}],
            },
            {"role": "tool", "content": "done", "tool_call_id": selection.tool_id},
        ],
        tools=[PAINT.metadata.to_openai_tool()],
    )
    assert "paint" in rendered.split("Paint it.")[1]
    assert answer.message.content == engine.generate(rendered, max_tokens=3).text


async def test_structured_output_by_a_call(llm: CacheBlendLLM) -> None:
    wall = llm.structured_predict(Wall, TEMPLATE, what="red")
    assert isinstance(wall, Wall)
    structured = llm.as_structured_llm(Wall)
    assert (await structured.achat([ChatMessage("Describe the red wall.")])).raw == wall


async def test_structured_output_as_text(engine: Engine) -> None:
    """As for models without tools, and for what streams."""
    llm = CacheBlendLLM(engine=engine, max_tokens=48, pydantic_program_mode=PydanticProgramMode.LLM)
    wall = llm.structured_predict(Wall, TEMPLATE, what="red")
    assert isinstance(wall, Wall)
    assert await llm.astructured_predict(Wall, TEMPLATE, what="red") == wall
    default = CacheBlendLLM(engine=engine, max_tokens=48)
    *_, last = default.stream_structured_predict(Wall, TEMPLATE, what="red")
    assert Wall.model_validate(last.model_dump()) == wall
    *_, last = [partial async for partial in await default.astream_structured_predict(Wall, TEMPLATE, what="red")]
    assert Wall.model_validate(last.model_dump()) == wall


def test_json_schema_of_a_call(llm: CacheBlendLLM) -> None:
    text = llm.complete("A wall as JSON:", structured_outputs={"json": Wall.model_json_schema()}).text
    Wall.model_validate_json(text)


async def test_agent(engine: Engine) -> None:
    """One round: the call is forced, the tool runs, the model has the result and answers."""
    llm = CacheBlendLLM(engine=engine, max_tokens=32)
    agent = FunctionAgent(tools=[PAINT], llm=llm, initial_tool_choice="paint", allow_parallel_tool_calls=False)
    handler = agent.run("Paint it red.", max_iterations=3, early_stopping_method="generate")
    events = [event async for event in handler.stream_events()]
    output = await asyncio.wait_for(handler, 60)
    results = [event for event in events if isinstance(event, ToolCallResult)]
    assert str(results[0].tool_output.content) in ("painted red", "painted green")
    assert isinstance(output, AgentOutput)


@pytest.mark.slow
async def test_agent_with_a_model_that_calls_tools(tool_model: str) -> None:
    engine = load_engine(tool_model)
    llm = CacheBlendLLM(engine=engine, max_tokens=128)
    agent = FunctionAgent(tools=[PAINT, WASH], llm=llm, initial_tool_choice="paint")
    handler = agent.run("Paint the wall green. Then say what you did.")
    events = [event async for event in handler.stream_events()]
    results = [event for event in events if isinstance(event, ToolCallResult)]
    assert str(results[0].tool_output.content) == "painted green"
    assert str(await handler)
    engine.close()
