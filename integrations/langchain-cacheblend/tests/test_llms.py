from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from cacheblend_rag import BlendConfig
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ConfigError, PromptTooLongError
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.load import dumps, load
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import GenerationChunk, LLMResult
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import ConfigurableField, Runnable
from transformers import AutoTokenizer

from langchain_cacheblend import CacheBlendLLM

Call = Callable[..., Awaitable[str]]
Passages = Callable[[int], list[str]]
AssertLoopRuns = Callable[[Awaitable[object]], Awaitable[None]]


async def _invoke(llm: Runnable[Any, str], prompt: str, **kwargs: Any) -> str:
    return llm.invoke(prompt, **kwargs)


async def _batch(llm: Runnable[Any, str], prompt: str, **kwargs: Any) -> str:
    other, text = llm.batch(["The capital of France is", prompt], **kwargs)
    assert other != text
    return text


async def _stream(llm: Runnable[Any, str], prompt: str, **kwargs: Any) -> str:
    return "".join(llm.stream(prompt, **kwargs))


async def _ainvoke(llm: Runnable[Any, str], prompt: str, **kwargs: Any) -> str:
    return await llm.ainvoke(prompt, **kwargs)


async def _abatch(llm: Runnable[Any, str], prompt: str, **kwargs: Any) -> str:
    other, text = await llm.abatch(["The capital of France is", prompt], **kwargs)
    assert other != text
    return text


async def _astream(llm: Runnable[Any, str], prompt: str, **kwargs: Any) -> str:
    return "".join([piece async for piece in llm.astream(prompt, **kwargs)])


CALLS = [_invoke, _batch, _stream, _ainvoke, _abatch, _astream]
LENGTH = 4
every_call = pytest.mark.parametrize("call", CALLS, ids=[call.__name__.strip("_") for call in CALLS])


@pytest.fixture(scope="module")
def llm(engine: Engine) -> CacheBlendLLM:
    return CacheBlendLLM(engine=engine, max_tokens=LENGTH)


@pytest.fixture(scope="module")
def prompt(engine: Engine) -> str:
    notes = ["Anna keeps three grey cats, two dogs and a parrot in the old mill by the river. " * 4]
    engine.warm(notes)
    return f"Notes:\n\n{notes[0]}\n\nA story about Anna and her animals:\n\nOnce upon a time"


@pytest.fixture(scope="module")
def answer(engine: Engine, prompt: str) -> str:
    generation = engine.generate(prompt, max_tokens=LENGTH)
    assert generation.stats.reused_tokens > 0
    assert len(generation.text) > 10
    return generation.text


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.chunks: list[GenerationChunk] = []
        self.results: list[LLMResult] = []

    def on_llm_new_token(self, token: str, *, chunk: GenerationChunk, **kwargs: Any) -> None:
        self.tokens.append(token)
        self.chunks.append(chunk)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        self.results.append(response)


class AsyncRecorder(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.tokens: list[str] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()

    async def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        self.tokens.append(token)
        self.loops.add(asyncio.get_running_loop())


@every_call
async def test_stop(llm: CacheBlendLLM, prompt: str, answer: str, call: Call) -> None:
    stop = answer[6:8]
    assert await call(llm, prompt, stop=[stop]) == answer[: answer.index(stop)]


@every_call
async def test_bound_settings_override(engine: Engine, prompt: str, answer: str, call: Call) -> None:
    own = CacheBlendLLM(engine=engine, max_tokens=3, temperature=0.9, stop=[answer[2]])
    assert await call(own.bind(max_tokens=LENGTH, temperature=0, stop=[]), prompt) == answer


@every_call
async def test_unknown_setting_is_refused(llm: CacheBlendLLM, prompt: str, call: Call) -> None:
    with pytest.raises(ConfigError, match="max_token'"):
        await call(llm, prompt, max_token=3)
    with pytest.raises(ConfigError, match="recompute"):
        await call(llm, prompt, blend={"recompute": 0.3})
    with pytest.raises(ConfigError, match="temperature"):
        await call(llm, prompt, temperature=-1)


@every_call
async def test_answer_and_callbacks(llm: CacheBlendLLM, prompt: str, answer: str, call: Call) -> None:
    recorder = Recorder()
    assert await call(llm, prompt, config={"callbacks": [recorder]}) == answer
    result = recorder.results[-1]
    generation = result.generations[0][0]
    assert generation.text == answer
    assert generation.generation_info is not None
    assert generation.generation_info["finish_reason"] == "length"
    assert generation.generation_info["stats"]["reused_tokens"] > 0
    assert generation.generation_info["ttft"] > 0
    if "stream" in call.__name__:
        assert "".join(recorder.tokens) == answer
        assert len(recorder.tokens) > 2
        infos = [chunk.generation_info for chunk in recorder.chunks]
        assert infos == [None] * (len(infos) - 1) + [generation.generation_info]
    else:
        assert recorder.results[0].llm_output is not None
        usage = recorder.results[0].llm_output["token_usage"]
        assert usage["completion_tokens"] == LENGTH * len(recorder.results)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert recorder.results[0].llm_output["model_name"] == llm.model


async def test_async_callbacks_run_in_the_callers_loop(llm: CacheBlendLLM, prompt: str, answer: str) -> None:
    recorder = AsyncRecorder()
    await _astream(llm, prompt, config={"callbacks": [recorder]})
    assert "".join(recorder.tokens) == answer
    assert recorder.loops == {asyncio.get_running_loop()}


@every_call
async def test_chain(llm: CacheBlendLLM, prompt: str, answer: str, call: Call) -> None:
    head, tail = prompt.split("animals")
    chain = PromptTemplate.from_template(head + "{what}" + tail) | llm | StrOutputParser()
    if "batch" in call.__name__:
        inputs = [{"what": "plants"}, {"what": "animals"}]
        texts = chain.batch(inputs) if call is _batch else await chain.abatch(inputs)
        assert texts[1] == answer
    else:
        assert await call(chain, {"what": "animals"}) == answer


async def test_concurrent_calls(llm: CacheBlendLLM, engine: Engine, prompt: str) -> None:
    prompts = [prompt.replace("animals", word) for word in ("animals", "birds", "cats")]
    expected = [engine.generate(one, max_tokens=LENGTH).text for one in prompts]
    assert await asyncio.gather(*(llm.ainvoke(one) for one in prompts)) == expected
    assert await asyncio.gather(*(_astream(llm, one) for one in prompts)) == expected


@pytest.mark.parametrize("call", [_ainvoke, _abatch, _astream])
async def test_event_loop_is_not_blocked(
    llm: CacheBlendLLM, prompt: str, call: Call, assert_loop_runs: AssertLoopRuns
) -> None:
    await assert_loop_runs(call(llm, prompt, max_tokens=40))


async def test_abandoned_streams(llm: CacheBlendLLM, prompt: str, answer: str) -> None:
    next(iter(llm.stream(prompt)))
    async for _ in llm.astream(prompt):
        break
    task = asyncio.ensure_future(_astream(llm, prompt, max_tokens=64))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert llm.invoke(prompt) == answer


def test_blend_override(llm: CacheBlendLLM, prompt: str) -> None:
    def stats(model: CacheBlendLLM, **kwargs: Any) -> dict[str, Any]:
        info = model.generate([prompt], max_tokens=1, **kwargs).generations[0][0].generation_info
        assert info is not None
        return dict(info["stats"])

    own = CacheBlendLLM(engine=llm.engine, blend={"recompute_ratio": 0.5}, max_tokens=1)
    assert own.blend == BlendConfig(recompute_ratio=0.5, mode="blend", min_reused_tokens=0)
    assert stats(llm)["recomputed_tokens"] < stats(own)["recomputed_tokens"]
    assert stats(llm, blend={"recompute_ratio": 0.5})["recomputed_tokens"] == stats(own)["recomputed_tokens"]
    assert stats(llm, blend={"mode": "off"})["reused_tokens"] == 0
    assert stats(own, blend=llm.blend)["recomputed_tokens"] == stats(llm)["recomputed_tokens"]


def test_sampling_is_repeatable_with_a_seed(llm: CacheBlendLLM, prompt: str) -> None:
    texts = [llm.invoke(prompt, temperature=1.5, top_p=0.99, top_k=50, seed=seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_cache_keys_on_all_settings_of_a_call(engine: Engine, prompt: str, answer: str) -> None:
    llm = CacheBlendLLM(engine=engine, max_tokens=LENGTH, cache=InMemoryCache())

    def is_cached(model: CacheBlendLLM, **kwargs: Any) -> bool:
        return model.generate([prompt], **kwargs).llm_output == {}

    for settings in (
        {},
        {"max_tokens": 2},
        {"temperature": 0.7, "seed": 1},
        {"stop": [answer[3]]},
        {"blend": {"recompute_ratio": 1.0}},
    ):
        assert not is_cached(llm, **settings)
        assert is_cached(llm, **settings)
    assert llm.invoke(prompt, max_tokens=2) != llm.invoke(prompt) == answer
    stopping = CacheBlendLLM(engine=engine, max_tokens=LENGTH, cache=llm.cache, stop=[answer[4]])
    assert not is_cached(stopping)
    assert is_cached(CacheBlendLLM(engine=engine, max_tokens=LENGTH, cache=llm.cache))


def test_configurable_fields(llm: CacheBlendLLM, engine: Engine, prompt: str) -> None:
    configurable = llm.configurable_fields(max_tokens=ConfigurableField(id="length"))
    text = configurable.invoke(prompt, config={"configurable": {"length": 3}})
    assert text == engine.generate(prompt, max_tokens=3).text


def test_token_counts(llm: CacheBlendLLM, model_path: str, passages: Passages) -> None:
    (text,) = passages(1)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    assert llm.get_num_tokens(text) == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_bad_construction(engine: Engine, model_path: str) -> None:
    with pytest.raises(ConfigError, match="max_token'"):
        CacheBlendLLM(engine=engine, max_token=3)
    with pytest.raises(ConfigError, match="temperature"):
        CacheBlendLLM(engine=engine, temperature=-1)
    with pytest.raises(ConfigError, match="recompute_ratio"):
        CacheBlendLLM(engine=engine, blend={"recompute_ratio": 2})
    with pytest.raises(ConfigError, match="model"):
        CacheBlendLLM(max_tokens=3)
    with pytest.raises(ConfigError, match="store"):
        CacheBlendLLM(engine=engine, store="elsewhere")
    with pytest.raises(ConfigError, match="abacus"):
        CacheBlendLLM(model=model_path, engine="abacus")


def test_a_guard_comes_with_the_engine(model_path: str) -> None:
    llm = CacheBlendLLM(model=model_path, dtype="float32", guard=0.5)
    assert llm.engine.guard is not None
    llm.engine.close()
    with pytest.raises(ConfigError, match="guard must be a share"):
        CacheBlendLLM(model="no such model", guard=2.0)


def test_prompt_too_long(llm: CacheBlendLLM) -> None:
    with pytest.raises(PromptTooLongError):
        llm.invoke("word " * llm.engine.context_window)


def test_serialised_as_its_settings(llm_from_settings: CacheBlendLLM, prompt: str, answer: str) -> None:
    data = json.loads(dumps(llm_from_settings))
    revived = load(data, allowed_objects=[CacheBlendLLM], valid_namespaces=["langchain_cacheblend"])
    assert revived.engine is not llm_from_settings.engine
    assert revived._identifying_params == llm_from_settings._identifying_params
    assert json.loads(dumps(revived)) == data
    assert revived.invoke(prompt) == llm_from_settings.invoke(prompt) == answer
    revived.engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        revived.invoke(prompt)


def test_serialised_without_what_it_may_not_hold(llm: CacheBlendLLM, engine: Engine) -> None:
    assert json.loads(dumps(llm))["type"] == "not_implemented"
    settings = {"engine": "transformers", "model": "m", "store": "redis://user:hunter2@host/0"}
    url = CacheBlendLLM(engine=engine, engine_settings=settings)
    assert json.loads(dumps(url))["kwargs"]["store"] == {"lc": 1, "type": "secret", "id": ["CACHEBLEND_STORE"]}
    token = CacheBlendLLM(engine=engine, engine_settings={**settings, "engine_args": {"token": "hunter2", "x": 1}})
    assert json.loads(dumps(token))["type"] == "not_implemented"
    assert token._identifying_params["engine_args"] == {"x": 1}
    for secret in (url, token):
        assert "hunter2" not in dumps(secret) + str(secret) + repr(secret)


def test_identifying_params(llm: CacheBlendLLM, engine: Engine) -> None:
    assert llm._identifying_params == CacheBlendLLM(engine=engine, max_tokens=LENGTH)._identifying_params
    json.dumps(llm._identifying_params)
    for change in (
        {"max_tokens": LENGTH + 1},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"seed": 1},
        {"stop": ["x"]},
        {"blend": {"policy": "hkvd"}},
    ):
        other = CacheBlendLLM(engine=engine, **{"max_tokens": LENGTH, **change})
        assert other._identifying_params != llm._identifying_params


@every_call
async def test_logprobs(llm: CacheBlendLLM, prompt: str, answer: str, call: Call) -> None:
    recorder = Recorder()
    await call(llm, prompt, logprobs=1, config={"callbacks": [recorder]})
    info = recorder.results[-1].generations[0][0].generation_info
    assert info is not None
    content = info["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == answer
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0 for entry in content)


async def test_several_answers(llm: CacheBlendLLM, prompt: str) -> None:
    settings: dict[str, Any] = {"n": 2, "temperature": 1.5, "seed": 3}
    other = "Once upon a time"
    results = [llm.generate([prompt, other], **settings), await llm.agenerate([prompt, other], **settings)]
    expected = [[llm.invoke(one, temperature=1.5, seed=seed) for seed in (3, 4)] for one in (prompt, other)]
    for result in results:
        assert [[generation.text for generation in to_one] for to_one in result.generations] == expected


@every_call
async def test_timeout(llm: CacheBlendLLM, prompt: str, call: Call) -> None:
    with pytest.raises(TimeoutError, match=r"0\.001 s"):
        await call(llm, prompt, timeout=0.001)


async def test_fifty_at_once(llm: CacheBlendLLM) -> None:
    words = [f"{word}{number}" for number in range(10) for word in ("red", "blue", "old", "new", "low")]
    expected = [llm.engine.generate(word, max_tokens=1).text for word in words]
    assert await asyncio.gather(*(llm.ainvoke(word, max_tokens=1) for word in words)) == expected
