from __future__ import annotations

import asyncio
import functools
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypedDict

import pytest
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import AnswerTimeoutError, ConfigError, PromptTooLongError, ServerError
from langchain_core.caches import InMemoryCache
from langchain_core.exceptions import ContextOverflowError, OutputParserException
from langchain_core.load import dumps, load
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel, Field

from langchain_cacheblend import ChatCacheBlend

AssertLoopRuns = Callable[[Awaitable[object]], Awaitable[None]]
Call = Callable[..., Awaitable[BaseMessage]]
NOTE = "Anna keeps three grey cats, two dogs and a parrot in the old mill by the river. " * 4
LENGTH = 4


def _whole(chunks: list[Any]) -> AIMessageChunk:
    return functools.reduce(lambda whole, chunk: whole + chunk, chunks)


async def _invoke(model: Any, messages: Any, **kwargs: Any) -> BaseMessage:
    return model.invoke(messages, **kwargs)


async def _batch(model: Any, messages: Any, **kwargs: Any) -> BaseMessage:
    return model.batch(["Hello", messages], **kwargs)[1]


async def _stream(model: Any, messages: Any, **kwargs: Any) -> BaseMessage:
    return _whole(list(model.stream(messages, **kwargs)))


async def _ainvoke(model: Any, messages: Any, **kwargs: Any) -> BaseMessage:
    return await model.ainvoke(messages, **kwargs)


async def _abatch(model: Any, messages: Any, **kwargs: Any) -> BaseMessage:
    return (await model.abatch(["Hello", messages], **kwargs))[1]


async def _astream(model: Any, messages: Any, **kwargs: Any) -> BaseMessage:
    return _whole([chunk async for chunk in model.astream(messages, **kwargs)])


CALLS = [_invoke, _batch, _stream, _ainvoke, _abatch, _astream]
every_call = pytest.mark.parametrize("call", CALLS, ids=[call.__name__.strip("_") for call in CALLS])
invoke_and_stream = pytest.mark.parametrize("call", [_ainvoke, _stream], ids=["ainvoke", "stream"])


class Light(BaseModel):
    """Switch a light."""

    room: Literal["kitchen", "cellar"]
    on: bool


class Colour(TypedDict):
    """A colour."""

    name: Literal["red", "green"]


@pytest.fixture(scope="module")
def model(chat_engine: Engine) -> ChatCacheBlend:
    return ChatCacheBlend(engine=chat_engine, max_tokens=LENGTH)


@pytest.fixture
def real_model(real_chat_engine: Engine) -> ChatCacheBlend:
    return ChatCacheBlend(engine=real_chat_engine, max_tokens=LENGTH)


@pytest.fixture(scope="module")
def question(chat_engine: Engine) -> list[BaseMessage]:
    chat_engine.warm([NOTE])
    return [SystemMessage("Answer from the notes."), HumanMessage(f"{NOTE}\n\nWhat does Anna keep in the mill?")]


@pytest.fixture(scope="module")
def answer(chat_engine: Engine, question: list[BaseMessage]) -> str:
    roles = ("system", "user")
    messages = [{"role": role, "content": message.content} for role, message in zip(roles, question, strict=True)]
    generation = chat_engine.generate(chat_engine.render_chat(messages), max_tokens=LENGTH)
    assert generation.stats.reused_tokens > 0
    return generation.text


@every_call
async def test_answer(model: ChatCacheBlend, question: list[BaseMessage], answer: str, call: Call) -> None:
    message = await call(model, question)
    assert isinstance(message, AIMessage)
    assert message.content == answer
    usage = message.usage_metadata
    assert usage is not None
    details: dict[str, Any] = dict(usage["input_token_details"])
    assert details["cache_read"] > 0
    assert sum(details.values()) == usage["input_tokens"]
    assert details["cacheblend_recomputed"] > 0 and details["cacheblend_missed"] > 0
    assert usage["output_tokens"] == LENGTH and usage["total_tokens"] == usage["input_tokens"] + LENGTH
    told = message.response_metadata
    assert (told["model_name"], told["finish_reason"], told["decision"]) == (model.model, "length", "blend")
    assert told["ttft"] > 0
    assert told["stats"]["reused_tokens"] == details["cache_read"]


@every_call
async def test_stop_and_overrides(chat_engine: Engine, question: list[BaseMessage], answer: str, call: Call) -> None:
    own = ChatCacheBlend(engine=chat_engine, max_tokens=1, temperature=0.9, stop=["x"])
    stop = answer[4:6]
    message = await call(own.bind(max_tokens=LENGTH, temperature=0), question, stop=[stop])
    assert message.content == answer[: answer.index(stop)]
    assert message.response_metadata["finish_reason"] == "stop"
    with pytest.raises(ConfigError, match="max_token'"):
        await call(own, question, max_token=3)
    with pytest.raises(ConfigError, match="recompute"):
        await call(own, question, blend={"recompute": 0.3})


def test_a_call_changes_the_blend(model: ChatCacheBlend, question: list[BaseMessage]) -> None:
    def details(**kwargs: Any) -> Any:
        usage = model.bind(max_tokens=1).invoke(question, **kwargs).usage_metadata
        assert usage is not None
        return usage["input_token_details"]

    assert details(blend={"mode": "off"})["cache_read"] == 0
    assert details(blend={"recompute_ratio": 1.0})["cacheblend_recomputed"] > details()["cacheblend_recomputed"]


@pytest.mark.parametrize(
    "choice", ["any", True, "required", "Light", {"type": "function", "function": {"name": "Light"}}]
)
def test_tool_choice(real_model: ChatCacheBlend, choice: Any) -> None:
    bound = real_model.bind_tools([Light], tool_choice=choice, parallel_tool_calls=False, max_tokens=48)
    message = bound.invoke("It is dark in the cellar.")
    (call,) = message.tool_calls
    assert call["name"] == "Light" and call["id"]
    Light.model_validate(call["args"], strict=True)
    assert message.content == ""
    assert message.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("call", [_batch, _ainvoke, _astream], ids=["batch", "ainvoke", "astream"])
async def test_tool_calls(model: ChatCacheBlend, call: Call) -> None:
    def set_heating(degrees: Literal[18, 21]) -> None:
        """Set the heating."""

    bound = model.bind_tools([Light, set_heating], tool_choice="set_heating", max_tokens=48)
    message = await call(bound, "It is cold.")
    assert isinstance(message, AIMessage)
    (tool_call,) = message.tool_calls
    assert tool_call["name"] == "set_heating" and tool_call["args"]["degrees"] in (18, 21)
    assert not message.invalid_tool_calls and message.content == ""


def test_several_calls(model: ChatCacheBlend) -> None:
    message = model.bind_tools([Light], tool_choice="any", max_tokens=120).invoke("Kitchen on, cellar off.")
    assert message.tool_calls
    for tool_call in message.tool_calls:
        Light.model_validate(tool_call["args"], strict=True)
    assert len({tool_call["id"] for tool_call in message.tool_calls}) == len(message.tool_calls)


def test_no_calls(model: ChatCacheBlend) -> None:
    message = model.bind_tools([Light], tool_choice="none").invoke("It is dark in the cellar.")
    assert message.content and not message.tool_calls
    with pytest.raises(ConfigError, match="Lamp"):
        model.bind_tools([Light], tool_choice="Lamp")


def test_a_template_without_tools(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="chat_template"):
        ChatCacheBlend(engine=engine).bind_tools([Light])


def test_messages_of_tools_reach_the_template(model: ChatCacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[str] = []
    generate = model.engine.generate
    monkeypatch.setattr(
        model.engine, "generate", lambda prompt, **kwargs: (prompts.append(prompt), generate(prompt, **kwargs))[1]
    )
    called = AIMessage("", tool_calls=[{"name": "Light", "args": {"room": "cellar", "on": True}, "id": "abcdefghi"}])
    messages = [HumanMessage("Light!"), called, ToolMessage("It is on.", tool_call_id="abcdefghi"), HumanMessage("Ok?")]
    model.bind_tools([Light]).invoke(messages)
    (prompt,) = prompts
    assert '<tool_call>\n{"name": "Light", "arguments": {"room": "cellar", "on": true}}\n</tool_call>' in prompt
    assert "<tool_response>\nIt is on.\n</tool_response>" in prompt
    assert "Switch a light." in prompt
    assert prompt.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@invoke_and_stream
async def test_structured_output(model: ChatCacheBlend, method: Any, call: Call) -> None:
    bound = {"max_tokens": 60}
    if call is _ainvoke:
        light = await model.with_structured_output(Light, method=method, **bound).ainvoke("Light in the cellar!")
        colour = await model.with_structured_output(Colour, method=method, **bound).ainvoke("A colour?")
    else:
        *_, light = model.with_structured_output(Light, method=method, **bound).stream("Light in the cellar!")
        *_, colour = model.with_structured_output(Colour, method=method, **bound).stream("A colour?")
    assert isinstance(light, Light)
    assert isinstance(colour, dict) and colour["name"] in ("red", "green")


def test_structured_output_with_its_message(model: ChatCacheBlend) -> None:
    schema = Light.model_json_schema()
    both: Any = model.with_structured_output(schema, include_raw=True, max_tokens=60).invoke("Light in the cellar!")
    assert both["parsing_error"] is None
    assert json.loads(both["raw"].content) == both["parsed"]
    cut: Any = model.with_structured_output(Light, include_raw=True, max_tokens=3).invoke("Light in the cellar!")
    assert cut["parsed"] is None
    assert isinstance(cut["parsing_error"], OutputParserException)
    for wanted in (Light, schema):
        with pytest.raises(OutputParserException, match="max_tokens"):
            model.with_structured_output(wanted, max_tokens=3).invoke("Light in the cellar!")
    with pytest.raises(ConfigError, match="method"):
        model.with_structured_output(Light, method="guessing")  # type: ignore[arg-type]


def test_json_mode_and_formats(model: ChatCacheBlend) -> None:
    assert model.with_structured_output(method="json_mode", max_tokens=30)
    wanted = {"type": "json_schema", "json_schema": {"name": "light", "schema": Light.model_json_schema()}}
    Light.model_validate_json(str(model.invoke("Light!", response_format=wanted, max_tokens=60).content))
    assert model.invoke("Yes?", structured_outputs={"choice": ["yes", "no"]}).content in ("yes", "no")
    opened = model.invoke("A JSON object.", response_format={"type": "json_object"}).content
    assert str(opened).startswith("{")
    with pytest.raises(ConfigError, match="response_format"):
        model.invoke("x", response_format={"type": "xml"})
    with pytest.raises(ConfigError, match="structured_outputs"):
        model.invoke("x", structured_outputs={"yaml": "x"})


@invoke_and_stream
async def test_logprobs(model: ChatCacheBlend, question: list[BaseMessage], answer: str, call: Call) -> None:
    message = await call(model, question, logprobs=True, top_logprobs=2)
    content = message.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == answer
    for entry in content:
        assert entry["logprob"] <= 0 and bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "bytes", "logprob")}  # greedy


def test_counts_tokens_of_messages(model: ChatCacheBlend, question: list[BaseMessage]) -> None:
    usage = model.bind(max_tokens=1).invoke(question).usage_metadata
    assert usage is not None
    assert model.get_num_tokens_from_messages(question) == usage["input_tokens"]
    assert model.get_num_tokens_from_messages(question, tools=[Light]) > usage["input_tokens"]


def test_cache_keys_on_all_settings_of_a_call(model: ChatCacheBlend, question: list[BaseMessage]) -> None:
    cached = ChatCacheBlend(engine=model.engine, max_tokens=2, cache=InMemoryCache())

    def is_cached(**kwargs: Any) -> bool:
        before = sum(model.engine.counts.values())  # type: ignore[attr-defined]
        cached.invoke(question, **kwargs)
        return sum(model.engine.counts.values()) == before  # type: ignore[attr-defined]

    for settings in ({}, {"max_tokens": 3}, {"blend": {"recompute_ratio": 1.0}}, {"stop": ["x"]}):
        assert not is_cached(**settings)
        assert is_cached(**settings)
    other = ChatCacheBlend(engine=model.engine, max_tokens=2, seed=3, cache=cached.cache)
    assert other._get_llm_string() != cached._get_llm_string()


async def test_fifty_at_once(model: ChatCacheBlend) -> None:
    words = [f"{letter}{number}" for number in range(2) for letter in "abcdefghijklmnopqrstuvwxy"]
    pattern = [{"choice": [word]} for word in words]
    order: list[int] = []

    async def ask(number: int) -> str:
        message = await model.ainvoke(
            words[number], structured_outputs=pattern[number], max_tokens=4, blend={"mode": "off"}
        )
        order.append(number)
        return str(message.content)

    assert await asyncio.gather(*(ask(number) for number in range(50))) == words
    # Begun in order, and interleaved: nobody overtakes more than those who are answered at the same time.
    assert max(abs(place - number) for place, number in enumerate(order)) < 16


@pytest.mark.parametrize("call", [_ainvoke, _astream], ids=["ainvoke", "astream"])
async def test_event_loop_is_not_blocked(
    model: ChatCacheBlend, question: list[BaseMessage], call: Call, assert_loop_runs: AssertLoopRuns
) -> None:
    await assert_loop_runs(call(model, question, max_tokens=40))


def test_errors(model: ChatCacheBlend, question: list[BaseMessage]) -> None:
    with pytest.raises(ContextOverflowError) as caught:
        model.invoke("word " * model.engine.context_window)
    assert isinstance(caught.value, PromptTooLongError)
    with pytest.raises(ContextOverflowError):
        list(model.stream("word " * model.engine.context_window))
    with pytest.raises(AnswerTimeoutError, match=r"0\.001 s"):
        model.invoke(question, timeout=0.001)
    with pytest.raises(ConfigError, match="image_url"):
        model.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])])
    assert model.invoke(question).content


async def test_a_server_that_does_not_answer() -> None:
    with socket.socket() as deaf:  # takes connections, says nothing
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        started = time.perf_counter()
        with pytest.raises(ServerError, match=r"did not answer within 0\.2 s"):
            ChatCacheBlend(model="m", engine="server", base_url=address, engine_args={"timeout": 0.2, "max_retries": 0})
        assert time.perf_counter() - started < 5
    with pytest.raises(ConnectionError, match="can't be reached"):
        ChatCacheBlend(model="m", engine="server", base_url=address, engine_args={"max_retries": 0})


def test_bad_construction(engine: Engine, model_path: str) -> None:
    for settings, match in (
        ({"engine": engine, "max_token": 3}, "max_token'"),
        ({"engine": engine, "temperature": -1}, "temperature"),
        ({"engine": engine, "timeout": 0}, "timeout"),
        ({"engine": engine, "store": "elsewhere"}, "store"),
        ({"max_tokens": 3}, "ChatCacheBlend needs model"),
        ({"model": model_path, "engine": "abacus"}, "abacus"),
        ({"model": model_path, "chat_template": "/nowhere.jinja"}, "nowhere"),
        ({"engine": engine, "top_logprobs": -1}, "top_logprobs"),
    ):
        with pytest.raises(ValueError, match=match):
            ChatCacheBlend(**settings)


def test_serialised_without_secrets(
    chat_engine: Engine, model_path: str, question: list[BaseMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"engine": "transformers", "model": model_path, "dtype": "float32"}
    model = ChatCacheBlend(engine=chat_engine, engine_settings=settings, max_tokens=2, api_key="hunter2")
    text = dumps(model)
    assert "hunter2" not in text + repr(model) + str(model)
    assert json.loads(text)["kwargs"]["api_key"] == {"lc": 1, "type": "secret", "id": ["CACHEBLEND_API_KEY"]}
    monkeypatch.setenv("CACHEBLEND_API_KEY", "other")
    revived = load(
        json.loads(text),
        allowed_objects=[ChatCacheBlend],
        valid_namespaces=["langchain_cacheblend"],
        secrets_from_env=True,
    )
    with revived.engine:
        assert revived.api_key.get_secret_value() == "other"
        assert revived.max_tokens == 2 and revived.blend == model.blend
        assert revived.model == model.model
    assert json.loads(dumps(ChatCacheBlend(engine=chat_engine)))["type"] == "not_implemented"


class Long(BaseModel):
    """Something long."""

    text: str = Field(max_length=5)


def test_limits_of_a_schema_hold(model: ChatCacheBlend) -> None:
    long: Any = model.with_structured_output(Long, max_tokens=60).invoke("Tell a long story.")
    assert isinstance(long, Long)


async def test_several_answers(model: ChatCacheBlend) -> None:
    prompt = [HumanMessage("Once upon a time")]
    settings: dict[str, Any] = {"n": 2, "temperature": 1.5, "seed": 3}
    first, second = model.generate([prompt], **settings).generations[0]
    assert first.text != second.text
    assert [first.text, second.text] == [model.invoke(prompt, temperature=1.5, seed=seed).content for seed in (3, 4)]
    again = (await model.agenerate([prompt], **settings)).generations[0]
    assert [generation.text for generation in again] == [first.text, second.text]
    with pytest.raises(ConfigError, match="n must"):
        model.invoke(prompt, n=0)


def test_an_answer_goes_on_from_its_beginning(real_model: ChatCacheBlend) -> None:
    messages = [HumanMessage("Count."), AIMessage("one, two, three, four,")]
    going_on = str(real_model.invoke(messages, continue_final_message=True).content)
    assert going_on.split()[0].startswith("five")


def test_variables_of_the_template(chat_engine: Engine) -> None:
    template = "{% if shout %}SHOUT {% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat_engine_template, tokenizer = chat_engine._loaded.tokenizer.chat_template, chat_engine._loaded.tokenizer  # type: ignore[attr-defined]
    tokenizer.chat_template = template
    try:
        loud = ChatCacheBlend(engine=chat_engine, max_tokens=1, chat_template_kwargs={"shout": True})
        count = loud.invoke("a").usage_metadata, loud.invoke("a", chat_template_kwargs={"shout": False}).usage_metadata
    finally:
        tokenizer.chat_template = chat_engine_template
    assert count[0] is not None and count[1] is not None
    assert count[0]["input_tokens"] > count[1]["input_tokens"]


def test_penalties(model: ChatCacheBlend) -> None:
    plain = model.invoke("Hello", max_tokens=2)
    token = model.engine.generate("x", max_tokens=1).token_ids[0]
    biased = model.invoke("Hello", max_tokens=2, logit_bias={token: 100}, repetition_penalty=1.0)
    assert biased.content == model.engine.decode([token, token]) != plain.content
    own = ChatCacheBlend(engine=model.engine, max_tokens=2, logit_bias={token: 100})
    assert own.invoke("Hello").content == biased.content


@pytest.mark.parametrize("cut", [12, 16])
async def test_a_call_that_is_cut_off_is_text(model: ChatCacheBlend, cut: int) -> None:
    """Completed by guessing, it would be run."""
    bound = model.bind_tools([Light], tool_choice="any", max_tokens=cut)
    message = await _ainvoke(bound, "It is dark.")
    assert isinstance(message, AIMessage)
    assert not message.tool_calls and str(message.content).startswith("<tool_call>")
    streamed = await _astream(bound, "It is dark.")
    assert isinstance(streamed, AIMessage)
    assert not streamed.tool_calls and not streamed.invalid_tool_calls
    assert streamed.content == message.content
    for method in ("function_calling", "json_schema"):
        with pytest.raises(OutputParserException, match="max_tokens"):
            model.with_structured_output(Light, method=method, max_tokens=3).invoke("It is dark.")  # type: ignore[arg-type]


def test_messages_with_content_blocks(model: ChatCacheBlend) -> None:
    own = ChatCacheBlend(engine=model.engine, max_tokens=48, output_version="v1")
    question = HumanMessage("It is dark.")
    call = own.bind_tools([Light], tool_choice="any", parallel_tool_calls=False).invoke([question])
    assert [block["type"] for block in call.content_blocks] == ["tool_call"]
    result = ToolMessage("It is on.", tool_call_id=str(call.tool_calls[0]["id"]))
    assert own.bind_tools([Light]).bind(max_tokens=2).invoke([question, call, result]).content


class Node(BaseModel):
    """A node."""

    name: Literal["a", "b"]
    children: list[Node] = Field(max_length=1)


def test_recursive_schema(model: ChatCacheBlend) -> None:
    from cacheblend_rag.structured import structural_tag

    bound: Any = model.with_structured_output(Node)
    schema = bound.first.kwargs["structured_outputs"]["json"]
    assert "$ref" in json.dumps(schema) and structural_tag({"json": schema})


def test_profile(model: ChatCacheBlend, engine: Engine) -> None:
    profile: Any = model.profile
    assert profile["max_input_tokens"] == model.engine.context_window - LENGTH
    assert profile["tool_calling"] and not profile["structured_output"]
    without: Any = ChatCacheBlend(engine=engine).profile
    assert without["structured_output"] and not without["tool_calling"]


def test_no_secret_in_what_is_written_down(chat_engine: Engine) -> None:
    arguments = {"default_headers": {"Authorization": "hunter2"}, "hf_token": "hunter2", "x": 1}
    settings = {"engine": "server", "model": "m", "base_url": "http://hunter2@host/v1", "engine_args": arguments}
    secret = ChatCacheBlend(engine=chat_engine, engine_settings=settings)
    assert "hunter2" not in dumps(secret) + str(secret) + repr(secret) + str(secret._identifying_params)
    settings["engine_args"] = {"x": 1}
    assert "hunter2" not in dumps(ChatCacheBlend(engine=chat_engine, engine_settings=settings))


def test_answers_of_other_templates_are_not_served(model: ChatCacheBlend, engine: Engine) -> None:
    keys = {ChatCacheBlend(engine=one)._get_llm_string() for one in (model.engine, engine)}
    assert len(keys) == 2
    asked = [{"response_format": kind} for kind in (Light, Node)] + [{}]
    assert len({model._get_llm_string(**settings) for settings in asked}) == 3


async def test_an_answer_that_nobody_waits_for_ends(model: ChatCacheBlend) -> None:
    long = model.bind(max_tokens=2000, ignore_eos=True)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(long.ainvoke("Count."), 0.5)
    started = time.perf_counter()
    await asyncio.gather(*(model.ainvoke("Hello", max_tokens=1) for _ in range(9)))
    assert time.perf_counter() - started < 30  # 2,000 tokens take longer
    assert model.engine._waiting._work_queue.empty()
