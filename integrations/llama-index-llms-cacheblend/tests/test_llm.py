from __future__ import annotations

import asyncio
import json
import math
import pickle
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cacheblend_rag import BlendConfig
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError, PromptTooLongError, ServerError
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, ImageBlock, MessageRole
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, TokenCountingHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.llms import LLM
from llama_index.core.prompts import PromptTemplate
from transformers import AutoTokenizer

from llama_index.llms.cacheblend import CacheBlendLLM, CacheBlendPostprocessor, CacheBlendTransform

Responses = list[CompletionResponse] | list[ChatResponse]
Call = Callable[..., Awaitable[Responses]]
Recorder = Any  # see conftest.py
AssertLoopRuns = Callable[[Awaitable[object]], Awaitable[None]]
LENGTH = 4


async def _complete(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return [llm.complete(prompt, **kwargs)]


async def _acomplete(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return [await llm.acomplete(prompt, **kwargs)]


async def _stream_complete(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return list(llm.stream_complete(prompt, **kwargs))


async def _astream_complete(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return [response async for response in await llm.astream_complete(prompt, **kwargs)]


async def _chat(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return [llm.chat([ChatMessage(prompt)], **kwargs)]


async def _achat(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return [await llm.achat([ChatMessage(prompt)], **kwargs)]


async def _stream_chat(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return list(llm.stream_chat([ChatMessage(prompt)], **kwargs))


async def _astream_chat(llm: LLM, prompt: str, **kwargs: Any) -> Responses:
    return [response async for response in await llm.astream_chat([ChatMessage(prompt)], **kwargs)]


CALLS = [_complete, _acomplete, _stream_complete, _astream_complete, _chat, _achat, _stream_chat, _astream_chat]
every_call = pytest.mark.parametrize("call", CALLS, ids=[call.__name__.strip("_") for call in CALLS])


def _text(responses: Responses) -> str:
    last = responses[-1]
    return last.text if isinstance(last, CompletionResponse) else last.message.content or ""


@pytest.fixture(scope="module")
def prompt(engine: Engine) -> str:
    notes = ["Anna keeps three grey cats, two dogs and a parrot in the old mill by the river. " * 2]
    engine.warm(notes)
    return f"Notes:\n\n{notes[0]}\n\nA story about Anna and her animals:\n\nOnce upon a time"


@pytest.fixture(scope="module")
def answers(engine: Engine, prompt: str) -> dict[bool, str]:
    """What the engine says: to the prompt, and to it as a message."""
    rendered = engine.render_chat([{"role": "user", "content": prompt}])
    generations = engine.generate([prompt, rendered], max_tokens=LENGTH)
    assert all(generation.stats.reused_tokens > 0 for generation in generations)
    completion, chat = (generation.text for generation in generations)
    assert completion != chat
    return {False: completion, True: chat}


@pytest.fixture
def answer(answers: dict[bool, str], call: Call) -> str:
    return answers["chat" in call.__name__]


@every_call
async def test_answer_and_what_is_told_of_it(
    engine: Engine, prompt: str, answer: str, call: Call, recorder: Recorder
) -> None:
    counter = TokenCountingHandler(tokenizer=lambda text: [])  # counts nothing itself
    llm = CacheBlendLLM(engine=engine, max_tokens=LENGTH, callback_manager=CallbackManager([counter]))
    responses = await call(llm, prompt)
    assert _text(responses) == answer

    last = responses[-1]
    report = last.additional_kwargs
    assert report["stats"]["reused_tokens"] > 0
    assert report["decision"] == report["stats"]["decision"] == "blend"
    assert report["ttft"] > 0
    assert report["finish_reason"] == "length"
    assert report["usage"] == {
        "prompt_tokens": report["stats"]["prompt_tokens"],
        "completion_tokens": LENGTH,
        "total_tokens": report["stats"]["prompt_tokens"] + LENGTH,
        "reused_tokens": report["stats"]["reused_tokens"],
    }
    assert last.raw is not None
    assert len(last.raw["token_ids"]) == LENGTH
    assert last.logprobs is None
    json.dumps(last.raw)

    is_chat, is_stream = "chat" in call.__name__, "stream" in call.__name__
    (start,) = recorder.of(LLMChatStartEvent if is_chat else LLMCompletionStartEvent)
    (end,) = recorder.of(LLMChatEndEvent if is_chat else LLMCompletionEndEvent)
    between = recorder.of(LLMChatInProgressEvent if is_chat else LLMCompletionInProgressEvent)
    assert start.model_dict["model_name"] == llm.model
    assert end.response == last
    assert len(between) == (len(responses) if is_stream else 0)
    assert counter.completion_llm_token_count == LENGTH
    assert counter.prompt_llm_token_count == report["stats"]["prompt_tokens"]

    if is_stream:
        assert len(responses) > 2
        assert "".join(response.delta or "" for response in responses) == answer
        assert [response.raw for response in responses[:-1]] == [None] * (len(responses) - 1)
        assert answer.startswith(_text(responses[:2]))


@pytest.mark.parametrize("call", [_complete, _astream_complete, _achat, _stream_chat])
async def test_settings_of_a_call(engine: Engine, prompt: str, answer: str, call: Call) -> None:
    own = CacheBlendLLM(engine=engine, max_tokens=1, temperature=0.9, stop=[answer[0]], seed=3)
    stop = answer[6:8]
    responses = await call(own, prompt, max_tokens=LENGTH, temperature=0, stop=[stop])
    assert _text(responses) == answer[: answer.index(stop)]
    assert len(_text(responses)) > 3


@every_call
async def test_unknown_and_bad_settings(llm: CacheBlendLLM, prompt: str, call: Call) -> None:
    with pytest.raises(ConfigError, match="max_token'"):
        await call(llm, prompt, max_token=3)
    with pytest.raises(ConfigError, match="recompute"):
        await call(llm, prompt, blend={"recompute": 0.3})
    with pytest.raises(ValueError, match="temperature"):
        await call(llm, prompt, temperature=-1)


@pytest.mark.parametrize("call", [_acomplete, _astream_chat])
async def test_logprobs(llm: CacheBlendLLM, prompt: str, call: Call) -> None:
    last = (await call(llm, prompt, logprobs=2))[-1]
    assert last.logprobs is not None
    assert last.raw is not None
    assert len(last.logprobs) == LENGTH
    for top, token in zip(last.logprobs, last.raw["token_ids"], strict=True):
        assert len(top) == 2
        assert top[0].logprob > top[1].logprob
        assert top[0].token == llm.engine.decode([token])
        assert math.isclose(top[0].logprob, last.raw["logprobs"][last.raw["token_ids"].index(token)][token])


def test_blend_override(llm: CacheBlendLLM, prompt: str) -> None:
    def stats(model: CacheBlendLLM, **kwargs: Any) -> dict[str, Any]:
        return dict(model.complete(prompt, max_tokens=1, **kwargs).additional_kwargs["stats"])

    own = CacheBlendLLM(engine=llm.engine, blend={"recompute_ratio": 0.5})
    assert own.blend == BlendConfig(recompute_ratio=0.5, mode="blend", min_reused_tokens=0)
    assert stats(llm)["recomputed_tokens"] < stats(own)["recomputed_tokens"]
    assert stats(llm, blend={"recompute_ratio": 0.5})["recomputed_tokens"] == stats(own)["recomputed_tokens"]
    assert stats(llm, blend={"mode": "off"})["reused_tokens"] == 0


def test_every_setting_of_sampling(engine: Engine, prompt: str) -> None:
    generation = engine.generate(prompt, max_tokens=LENGTH)
    first = generation.token_ids[0]
    own = CacheBlendLLM(engine=engine, max_tokens=LENGTH, logit_bias={first: -100}, min_tokens=1, timeout=60)
    raw = own.complete(prompt).raw
    assert raw is not None
    assert raw["token_ids"][0] != first
    raw = own.complete(prompt, logit_bias={}, stop_token_ids=[generation.token_ids[1]], min_p=0.5, max_retries=0).raw
    assert raw is not None
    assert raw["token_ids"] == generation.token_ids[:2]


def test_sampling_is_repeatable_with_a_seed(llm: CacheBlendLLM, prompt: str) -> None:
    texts = [llm.complete(prompt, temperature=1.5, top_p=0.99, top_k=50, seed=seed).text for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_callback_of_a_failure(engine: Engine) -> None:
    ends: list[Any] = []

    class Handler(TokenCountingHandler):
        def on_event_end(self, event_type: CBEventType, payload: Any = None, event_id: str = "", **kw: Any) -> None:
            ends.append(payload)

    llm = CacheBlendLLM(engine=engine, callback_manager=CallbackManager([Handler(tokenizer=lambda text: [])]))
    with pytest.raises(PromptTooLongError):
        llm.complete("word " * llm.metadata.context_window)
    assert isinstance(ends[0][EventPayload.EXCEPTION], ValueError)


async def test_fifty_calls_at_once(engine: Engine) -> None:
    llm = CacheBlendLLM(engine=engine, max_tokens=2)
    prompts = [f"{n}, {n + 1}," for n in range(50)]
    responses = await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))
    sample = range(0, 50, 16)
    expected = [engine.generate(prompts[n], max_tokens=2).text for n in sample]
    assert [responses[n].text for n in sample] == expected
    assert len(set(expected)) > 1
    assert all(response.additional_kwargs["usage"]["completion_tokens"] <= 2 for response in responses)


async def test_calls_of_all_kinds_at_once(llm: CacheBlendLLM, prompt: str, answers: dict[bool, str]) -> None:
    results = await asyncio.gather(*(call(llm, prompt) for call in CALLS if call.__name__.startswith("_a")))
    assert [_text(responses) for responses in results] == [answers[False]] * 2 + [answers[True]] * 2


@pytest.mark.parametrize("call", [_acomplete, _astream_complete, _achat, _astream_chat])
async def test_event_loop_is_not_blocked(
    real_engine: Engine, prompt: str, call: Call, assert_loop_runs: AssertLoopRuns
) -> None:
    await assert_loop_runs(call(CacheBlendLLM(engine=real_engine), prompt, max_tokens=40))


async def test_abandoned_streams(llm: CacheBlendLLM, prompt: str, answers: dict[bool, str]) -> None:
    next(llm.stream_complete(prompt))
    next(llm.stream_chat([ChatMessage(prompt)]))
    async for _ in await llm.astream_complete(prompt):
        break
    task = asyncio.ensure_future(_astream_chat(llm, prompt, max_tokens=64))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert llm.complete(prompt).text == answers[False]


def test_metadata(llm: CacheBlendLLM, engine: Engine, model_path: str) -> None:
    metadata = llm.metadata
    assert metadata.context_window == engine.context_window == 8192
    assert metadata.num_output == LENGTH
    assert metadata.is_chat_model
    assert metadata.is_function_calling_model
    assert metadata.model_name == model_path
    text = "Grey cats, and others."
    tokens = AutoTokenizer.from_pretrained(model_path)(text, add_special_tokens=False)["input_ids"]
    assert len(llm.tokenizer(text)) == len(tokens)


def test_prompts_of_llama_index(engine: Engine, prompt: str, answers: dict[bool, str]) -> None:
    head, tail = prompt.split("animals")
    template = PromptTemplate(head + "{what}" + tail)
    llm = CacheBlendLLM(engine=engine, max_tokens=LENGTH)
    assert llm.predict(template, what="animals") == answers[True]
    assert "".join(llm.stream(template, what="animals")) == answers[True]
    own = CacheBlendLLM(
        engine=engine,
        max_tokens=LENGTH,
        completion_to_prompt=lambda completion: head + completion + tail,
        messages_to_prompt=lambda messages: head + messages[0].content + tail,
    )
    assert own.complete("animals").text == answers[False]
    assert own.complete(prompt, formatted=True).text == answers[False]
    assert own.chat([ChatMessage("animals")]).message.content == answers[False]


def test_roles(engine: Engine, llm: CacheBlendLLM) -> None:
    messages = [
        ChatMessage("Be brief.", role=MessageRole.SYSTEM),
        ChatMessage("Hi.", role=MessageRole.USER),
        ChatMessage("Hello.", role=MessageRole.ASSISTANT),
        ChatMessage("Bye.", role=MessageRole.USER),
    ]
    rendered = engine.render_chat([{"role": m.role.value, "content": m.content} for m in messages])
    assert llm.chat(messages).message.content == engine.generate(rendered, max_tokens=LENGTH).text
    with pytest.raises(ConfigError, match="image"):
        llm.chat([ChatMessage(blocks=[ImageBlock(url="http://localhost/image.png")])])


def test_bad_construction(engine: Engine, model_path: str) -> None:
    nowhere = {"model": "no/such/model/anywhere"}
    for settings, message in [
        ({**nowhere, "max_token": 3}, "max_token'"),
        ({**nowhere, "temperature": -1}, "temperature"),
        ({**nowhere, "blend": {"recompute_ratio": 2}}, "recompute_ratio"),
        ({"max_tokens": 3}, "model"),
        ({"engine": engine, "store": "elsewhere"}, "store"),
        ({**nowhere, "engine": "abacus"}, "abacus"),
    ]:
        with pytest.raises(ConfigError, match=message):
            CacheBlendLLM(**settings)
    for cls in (CacheBlendTransform, CacheBlendPostprocessor):
        with pytest.raises(ConfigError, match="max_tokens"):
            cls(engine=engine, max_tokens=3)
        with pytest.raises(ConfigError, match=cls.__name__):
            cls()


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        CacheBlendLLM(
            model="m", engine="server", base_url="http://127.0.0.1:9/v1", engine_args={"max_retries": 0, "timeout": 2}
        )


def test_a_server_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        started = time.perf_counter()
        with pytest.raises(ServerError):
            CacheBlendLLM(model="m", engine="server", base_url=url, engine_args={"max_retries": 0, "timeout": 1})
        assert time.perf_counter() - started < 5


def test_serialised_as_its_settings(llm_from_settings: CacheBlendLLM, prompt: str, answers: dict[bool, str]) -> None:
    data = json.loads(llm_from_settings.to_json())
    assert data["class_name"] == "cacheblend_llm"
    assert data["max_tokens"] == LENGTH
    del data["chat_template"]  # the model's own has no tools
    data["blend"] |= {"recompute_ratio": "auto", "ratio_range": [0.1, 0.3]}
    revived = CacheBlendLLM.from_dict(data)
    assert revived.engine is not llm_from_settings.engine
    blend = BlendConfig(recompute_ratio="auto", ratio_range=(0.1, 0.3), mode="blend", min_reused_tokens=0)
    assert revived.blend == blend
    assert revived.metadata.is_chat_model
    assert not revived.metadata.is_function_calling_model
    assert revived.complete(prompt, blend=llm_from_settings.blend).text == answers[False]
    assert json.loads(revived.to_json()) == data
    revived.engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        revived.complete(prompt)


def test_serialised_without_secrets(llm_from_settings: CacheBlendLLM) -> None:
    engine = llm_from_settings.engine
    settings = engine.settings
    try:
        engine.settings = {
            "model": "m",
            "store": "redis://user:hunter2@host/0?password=hunter2",
            "base_url": "http://hunter2@host:8000/v1",
            "engine_args": {
                "api_key": "hunter2",
                "token": "hunter2",
                "default_headers": {"X": "hunter2"},
                "timeout": 3,
            },
        }
        llm = CacheBlendLLM(engine=engine)
        data = llm.to_dict()
        assert "hunter2" not in llm.to_json() + str(llm) + repr(llm) + str(llm.to_payload())
        assert data["store"] == "redis://host/0"
        assert data["base_url"] == "http://host:8000/v1"
        assert data["engine_args"] == {"timeout": 3}
    finally:
        engine.settings = settings


def test_pickled_as_its_settings(llm_from_settings: CacheBlendLLM) -> None:
    llm = CacheBlendLLM(engine=llm_from_settings.engine, max_tokens=2, system_prompt="Be brief.")
    copy = pickle.loads(pickle.dumps(llm))  # the engine is opened when it is used
    assert (copy.max_tokens, copy.system_prompt, copy.blend) == (2, "Be brief.", llm.blend)
    engine = llm_from_settings.engine
    settings = engine.settings
    try:
        for other, message in [
            (None, "load_engine"),
            ({"model": "m"}, "memory"),
            ({"model": "m", "engine": "vllm"}, "vllm"),
            ({"model": "m", "store": lambda: 0}, "sent"),
        ]:
            engine.settings = other
            with pytest.raises(ConfigError, match=message):
                pickle.dumps(llm)
    finally:
        engine.settings = settings


def test_further_settings(real_engine: Engine) -> None:
    engine = real_engine
    llm = CacheBlendLLM(engine=engine, max_tokens=2)
    token = engine.generate("x", max_tokens=1).token_ids[0]
    expected = engine.decode([token, token])
    assert llm.complete("Hello").text != expected
    assert llm.complete("Hello", logit_bias={token: 100}).text == expected
    assert CacheBlendLLM(engine=engine, max_tokens=2, logit_bias={token: 100}).complete("Hello").text == expected
    with pytest.raises(TimeoutError, match=r"0\.0001 s"):
        llm.complete("Hello", timeout=0.0001)
    messages = [ChatMessage("Count.", role="user"), ChatMessage("one, two, three, four,", role="assistant")]
    assert "five" in llm.chat(messages, continue_final_message=True, max_tokens=3).message.content


def test_settings_of_the_chat_template_need_it(engine: Engine) -> None:
    llm = CacheBlendLLM(engine=engine, max_tokens=2, messages_to_prompt=lambda messages: "Hello")
    assert llm.chat([ChatMessage("x")]).message.content
    for settings in ({"tool_choice": "required"}, {"continue_final_message": True}, {"chat_template_kwargs": {"a": 1}}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            llm.chat([ChatMessage("x")], **settings)
    biased = CacheBlendLLM(engine=engine, max_tokens=1, logit_bias={5: 1.0})
    assert json.loads(biased.to_json())["logit_bias"] == {"5": 1.0}
    assert CacheBlendLLM(engine=engine, logit_bias={"5": 1.0}).logit_bias == {5: 1.0}


def test_a_guard_comes_with_the_engine(model_path: str) -> None:
    llm = CacheBlendLLM(model=model_path, dtype="float32", guard=0.5)
    assert llm.engine.guard is not None
    llm.engine.close()
    with pytest.raises(ConfigError, match="guard must be a share"):
        CacheBlendLLM(model="no such model", guard=2.0)
