"""Over HTTP: ``cacheblend serve`` and a bare vLLM server on one store, and the engine that talks to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest

from cacheblend_rag import BlendConfig, ConfigError, PromptTooLongError, ServerError, UnsupportedModelError, load_engine
from cacheblend_rag.chat import prepare_chat
from cacheblend_rag.chat.tool_format import find_tool_format
from cacheblend_rag.engines.base import SamplingParams
from cacheblend_rag.engines.model_files import load_tokenizer, render_chat
from cacheblend_rag.engines.server import ServerEngine
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.errors import ChunkTooLongError
from cacheblend_rag.stats import BlendStats

from .conftest import BLEND, PRIMER, Case, Engines, random_text
from .servers import BARE, SERVE, free_port, serving, transfer_config

CHUNKS = [random_text(seed, 300 + 10 * seed) for seed in range(6)]
TEMPLATE = """{%- if tools %}Tools: {{ tools | tojson }}
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{%- for call in message.tool_calls or [] %}
{{ '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {}},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, engines: Engines) -> Path:
    engines.close()
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def replicas(folder: Path, small_smollm2: str) -> Iterator[tuple[str, str]]:
    """Base URLs of ``served`` and ``bare``. They start side by side: mostly they wait for imports."""
    (folder / "primer.txt").write_text(PRIMER)
    (folder / "template.jinja").write_text(TEMPLATE)
    options = ["--store", str(folder / "store"), "--namespace", "test", "--primer", str(folder / "primer.txt")]
    options += ["--mode", "blend", "--served-model-name", "smol", "--max-model-len", "4096"]
    options += ["--max-num-batched-tokens", "512", "--chat-template", str(folder / "template.jinja")]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    extra = {"store": str(folder / "store"), "namespace": "test", "primer": PRIMER, "blend": {"mode": "blend"}}
    bare_options = [*transfer_config(**extra), "--served-model-name", "smol", "--max-model-len", "4096"]
    servers = [
        serving([*SERVE, small_smollm2, *options], folder / "serve.log"),
        serving([*BARE, small_smollm2, *bare_options], folder / "bare.log"),
    ]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        served, bare = pool.map(stack.enter_context, servers)
        yield served, bare


@pytest.fixture(scope="module")
def served(replicas: tuple[str, str]) -> str:
    """``cacheblend serve``: base URL."""
    return replicas[0]


@pytest.fixture(scope="module")
def bare(replicas: tuple[str, str]) -> str:
    """A second replica: vLLM's own server with nothing but a KV connector; it shares the store."""
    return replicas[1]


@pytest.fixture(scope="module")
def engine(served: str) -> Iterator[ServerEngine]:
    with load_engine("smol", engine="server", base_url=served, namespace="test") as engine:
        assert isinstance(engine, ServerEngine)
        engine.warm(CHUNKS)
        yield engine


@pytest.fixture(scope="module")
def embedded(small_smollm2: str) -> Iterator[TransformersEngine]:
    """The embedded engine, to compare with."""
    with load_engine(small_smollm2, dtype="float32", primer=PRIMER, namespace="test", blend=BLEND) as engine:
        assert isinstance(engine, TransformersEngine)
        engine.warm(CHUNKS)
        yield engine


def prompt(seed: int) -> str:
    return Case(None, CHUNKS).prompt(seed)  # type: ignore[arg-type]  # only its texts are used


def post(url: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """What any client may do."""
    request = urllib.request.Request(
        f"{url}/{path}", json.dumps({"model": "smol", **body}).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def metric(url: str, name: str, **labels: str) -> float:
    with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = 0.0
    for line in text.splitlines():
        if line.startswith(f"vllm:cacheblend_{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            found += float(line.rsplit(" ", 1)[1])
    return found


# Any client


def test_a_client_without_our_code(served: str, engine: ServerEngine) -> None:
    status, answer = post(served, "completions", {"prompt": prompt(0), "max_tokens": 4, "temperature": 0})
    assert status == 200
    stats = answer["kv_transfer_params"]["cacheblend"]
    assert stats["decision"] == "blend"
    total = sum(stats[f"{kind}_tokens"] for kind in ("prefix", "reused", "recomputed", "missed"))
    assert total == stats["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert 0 < stats["load"] < stats["ttft"]


@pytest.mark.parametrize(
    "extra", [{}, {"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}], ids=["plain", "tools", "auto"]
)
def test_chat_completions_with_the_servers_template(served: str, engine: ServerEngine, extra: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "Answer from the passages."},
        {"role": "user", "content": "\n\n".join([*CHUNKS[1:4], "Which passage is the second?"])},
    ]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, **extra}
    status, answer = post(served, "chat/completions", body)
    assert status == 200
    stats = answer["kv_transfer_params"]["cacheblend"]
    assert stats["decision"] in ("blend", "prefix")
    assert stats["segments"] == 3 or stats["prefix_tokens"] > 256  # a repeat goes on from its own blocks
    client = openai.OpenAI(base_url=served, api_key="none")
    again = client.chat.completions.create(model="smol", **body)
    assert again.choices[0].message.content == answer["choices"][0]["message"]["content"]


def test_overrides_of_one_request(served: str, engine: ServerEngine) -> None:
    def stats(**ours: Any) -> dict[str, Any]:
        body = {"prompt": prompt(1), "max_tokens": 1, "kv_transfer_params": {"cacheblend": ours}}
        status, answer = post(served, "completions", body)
        assert status == 200
        told: dict[str, Any] = answer["kv_transfer_params"]["cacheblend"]
        return told

    assert stats(mode="off")["reason"] == "mode is off"
    half = stats(recompute_ratio=0.5, policy="hkvd")
    assert half["policy"] == "hkvd"
    assert half["recomputed_tokens"] == pytest.approx(half["reused_tokens"], abs=1)


BAD = [
    {"recompute_ratio": 7},
    {"recompute_ratio": "auto", "ratio_range": [0.1]},
    {"policy": "best"},
    {"check_layers": [30]},
    {"mode": "sometimes"},
    {"warm": "yes"},
    {"lookup": ["key"] * 257},
    {"temperature": 1},
    "blend",
]


@pytest.mark.parametrize("ours", BAD, ids=str)
def test_bad_settings_are_a_400(served: str, ours: Any) -> None:
    for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": []})):
        status, answer = post(served, path, {**body, "kv_transfer_params": {"cacheblend": ours}})
        assert status == 400
        assert answer["error"]["param"] == "kv_transfer_params"
        assert len(answer["error"]["message"].splitlines()) == 1


@pytest.mark.parametrize("ours", BAD, ids=str)
def test_on_a_bare_server_bad_settings_are_told_in_the_stats(bare: str, ours: Any) -> None:
    body = {"prompt": prompt(0), "max_tokens": 1, "kv_transfer_params": {"cacheblend": ours}}
    status, answer = post(bare, "completions", body)
    assert status == 200
    stats = answer["kv_transfer_params"]["cacheblend"]
    assert stats["decision"] != "blend"
    assert stats["reason"].startswith("bad kv_transfer_params: ")


@pytest.mark.parametrize(
    "body", [b"", b"{", b'"cacheblend"', b'{"cacheblend": 1}', b'[{"kv_transfer_params": "cacheblend"}]']
)
def test_broken_bodies_are_vllms_to_refuse(served: str, body: bytes) -> None:
    request = urllib.request.Request(f"{served}/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert 400 <= error.value.code < 500


def test_warming_by_any_client(served: str, bare: str, engine: ServerEngine) -> None:
    """Text in, a chunk stored; the other replica blends it at once."""
    text = random_text(99, 400)
    warm = {"prompt": text, "kv_transfer_params": {"cacheblend": {"warm": True}}}
    first, second = (post(served, "completions", warm)[1]["kv_transfer_params"]["cacheblend"] for _ in range(2))
    assert (first["stored"], second["stored"], second["already_there"]) == (1, 0, 1)
    assert first["bytes"] > first["tokens"] == engine.count_tokens(text)
    question = {"prompt": f"Read this.\n{text}\nWhat does it say, and why?", "max_tokens": 1}
    assert post(bare, "completions", question)[1]["kv_transfer_params"]["cacheblend"]["decision"] == "blend"
    evict = {"prompt": text, "kv_transfer_params": {"cacheblend": {"evict": True}}}
    assert post(bare, "completions", evict)[1]["kv_transfer_params"]["cacheblend"] == {"evicted": 1}
    question["prompt"] += " And how?"
    assert post(served, "completions", question)[1]["kv_transfer_params"]["cacheblend"]["decision"] != "blend"


def test_metrics(served: str, engine: ServerEngine) -> None:
    before = {kind: metric(served, "prompt_tokens_total", source=kind) for kind in ("reused", "missed")}
    requests = metric(served, "requests_total", decision="blend")
    read = metric(served, "read_bytes_total", tier="memory")
    stats = engine.generate(prompt(40), max_tokens=1).stats
    assert stats.decision == "blend"
    time.sleep(0.5)
    assert metric(served, "requests_total", decision="blend") == requests + 1
    assert metric(served, "prompt_tokens_total", source="reused") == before["reused"] + stats.reused_tokens
    assert metric(served, "prompt_tokens_total", source="missed") == before["missed"] + stats.missed_tokens
    assert metric(served, "read_bytes_total", tier="memory") == read + stats.read_bytes["memory"] > read
    assert metric(served, "read_seconds_total", tier="memory") >= stats.read_seconds["memory"] > 0
    assert metric(served, "ttft_seconds_count", decision="blend") == metric(served, "recompute_seconds_count") > 0
    assert metric(served, "warmed_chunks_total") >= len(CHUNKS)


# Invariants across processes


@pytest.mark.parametrize("policy", ["hkvd", "query_aware"])
def test_the_server_answers_as_the_embedded_engine_does(
    engine: ServerEngine, embedded: TransformersEngine, policy: str
) -> None:
    assert engine.scope == embedded.scope
    text = prompt(20 if policy == "hkvd" else 22)
    mine = engine.generate(text, max_tokens=8, logprobs=3, blend={"policy": policy})
    theirs = embedded.generate(text, max_tokens=8, logprobs=3, blend={"policy": policy})
    assert mine.token_ids == theirs.token_ids
    assert mine.stats.segments == theirs.stats.segments == 4
    assert mine.logprobs is not None and theirs.logprobs is not None
    assert mine.logprobs[0].keys() == theirs.logprobs[0].keys()


# LangChain


def test_langchain_over_the_server(served: str, engine: ServerEngine) -> None:
    pytest.importorskip("langchain_cacheblend")
    from langchain_cacheblend import CacheBlendLLM, CacheBlendVectorStore
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    llm = CacheBlendLLM(model="smol", engine="server", base_url=served, namespace="test", max_tokens=8)
    assert llm.blend == engine.blend  # the server's defaults
    assert llm.engine.blend.mode == "blend"
    store = CacheBlendVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=16)), llm.engine)
    texts = [random_text(seed, 400) for seed in (900, 901)]
    store.add_texts(texts)
    found = [document.page_content for document in store.similarity_search(texts[0], k=2)]
    text = "Notes:\n\n" + "\n\n".join(found) + "\n\nSummary:"
    answer = llm.generate([text, prompt(30)]).generations
    stats = [generations[0].generation_info["stats"] for generations in answer]
    assert [(s["decision"], s["segments"]) for s in stats] == [("blend", 2), ("blend", 4)]
    assert "".join(llm.stream(text)) == answer[0][0].text
    assert asyncio.run(llm.ainvoke(text)) == answer[0][0].text
    assert llm.generate([text], blend={"mode": "off"}).generations[0][0].generation_info["stats"]["reused_tokens"] == 0
    assert CacheBlendLLM(
        model="smol", engine="server", base_url=served, namespace="test", blend={"recompute_ratio": 0.4}
    ).blend == BlendConfig(recompute_ratio=0.4, mode="blend")


async def test_langchain_chat_over_the_server(served: str, engine: ServerEngine) -> None:
    pytest.importorskip("langchain_cacheblend")
    from langchain_cacheblend import ChatCacheBlend

    model = ChatCacheBlend(engine=engine, max_tokens=8)
    text = random_text(910, 400)
    engine.warm([text])
    message = model.invoke(f"{text}\n\nSummary:")
    assert message.usage_metadata is not None
    details: Any = message.usage_metadata["input_token_details"]
    assert details["cache_read"] > 0 and sum(details.values()) == message.usage_metadata["input_tokens"]
    assert message.response_metadata["decision"] in ("blend", "prefix")
    pieces = [chunk.content async for chunk in model.astream(f"{text}\n\nSummary:")]
    assert "".join(map(str, pieces)) == message.content

    def set_heating(degrees: Literal[18, 21]) -> None:
        """Set the heating."""

    for reply in (
        model.bind_tools([set_heating], tool_choice="any", parallel_tool_calls=False, max_tokens=60).invoke(text),
        await model.bind_tools([set_heating], tool_choice="set_heating", max_tokens=60).ainvoke(text),
    ):
        assert reply.tool_calls and all(call["args"]["degrees"] in (18, 21) for call in reply.tool_calls)
    told = await model.ainvoke("Hello", logprobs=True, top_logprobs=1, max_tokens=2, presence_penalty=0.5)
    assert "".join(entry["token"] for entry in told.response_metadata["logprobs"]["content"]) == told.content
    answers = await asyncio.gather(*(model.ainvoke(f"{number}", max_tokens=1) for number in range(30)))
    assert [answer.content for answer in answers] == [model.invoke(f"{n}", max_tokens=1).content for n in range(30)]


async def test_llama_index_over_the_server(served: str, engine: ServerEngine) -> None:
    pytest.importorskip("llama_index.llms.cacheblend")
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.schema import TextNode
    from llama_index.llms.cacheblend import CacheBlendLLM, CacheBlendTransform

    llm = CacheBlendLLM(model="smol", engine="server", base_url=served, namespace="test", max_tokens=8)
    text = random_text(920, 400)
    CacheBlendTransform(engine=llm.engine)([TextNode(text=text)])
    assert llm.engine.is_warm([text]) == [True]
    whole = llm.complete(f"Notes:\n\n{text}\n\nSummary:")
    assert whole.additional_kwargs["stats"]["reused_tokens"] > 0
    assert (await llm.acomplete(f"Notes:\n\n{text}\n\nSummary:")).text == whole.text
    chat = await llm.achat([ChatMessage(f"{text}\n\nSummary:")])
    *_, last = llm.stream_chat([ChatMessage(f"{text}\n\nSummary:")])
    assert last.message.content == chat.message.content
    assert last.additional_kwargs["stats"]["reused_tokens"] > 0


# The engine


def test_streams_join_to_the_answer(engine: ServerEngine) -> None:
    whole = engine.generate(prompt(2), max_tokens=12, logprobs=2, trace=True)
    *pieces, last = engine.stream(prompt(2), max_tokens=12, logprobs=2)
    assert last.generation is not None
    assert "".join([*pieces, last]) == whole.text == last.generation.text
    assert last.generation.token_ids == whole.token_ids
    assert len(pieces) > 4
    assert last.generation.stats.decision in ("blend", "prefix")
    assert last.generation.trace is None
    assert 0 < last.generation.stats.ttft < 60


def test_async_does_as_sync(engine: ServerEngine) -> None:
    async def ask() -> tuple[list[Any], str]:
        answers = await asyncio.gather(*(engine.agenerate(prompt(seed), max_tokens=6) for seed in (2, 3)))
        return answers, "".join([piece async for piece in engine.astream(prompt(2), max_tokens=6)])

    expected = [engine.generate(prompt(seed), max_tokens=6).text for seed in (2, 3)]
    for _ in range(2):  # each with an event loop of its own
        answers, streamed = asyncio.run(ask())
        assert [answer.text for answer in answers] == expected
        assert streamed == expected[0]


def test_event_loops_that_ended_leave_no_clients_behind(engine: ServerEngine) -> None:
    for _ in range(4):
        asyncio.run(engine.agenerate("Once", max_tokens=1))
    assert len(engine._async_clients) == 1


def test_what_breaks_off_is_an_error_and_no_short_answer(engine: ServerEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    request = engine._request("Once", BLEND, SamplingParams())
    answer = engine._client.completions.create(**request)
    answer.choices[0].finish_reason = "abort"  # type: ignore[assignment]  # what vLLM says when it gives a request up
    with pytest.raises(ServerError, match="abort"):
        engine._generation(answer, SamplingParams(), request, BLEND)
    with pytest.raises(ServerError, match="broke off: no room"), engine._errors():  # an error among a stream's events
        raise openai.APIError("no room", httpx.Request("POST", "http://localhost"), body=None)

    def unreachable(*_: Any) -> Any:
        raise ServerError("gone")

    monkeypatch.setattr(engine, "_complete", unreachable)  # the answer has come, its stats can't be had
    *_, last = engine.stream("Once", max_tokens=2)
    assert last.generation is not None
    assert last.generation.text
    assert "could not tell" in last.generation.stats.reason


def test_what_a_blend_chose_is_told(engine: ServerEngine) -> None:
    """In the response, or where that has no place for it, when it is asked for."""
    seen: list[BlendStats] = []
    engine.add_observer(seen.append)
    whole = engine.generate(prompt(7), max_tokens=9, trace=True)
    assert seen == [whole.stats]
    assert whole.trace is not None
    assert len(whole.trace.recomputed) == whole.stats.recomputed_tokens > 20
    assert whole.trace.read is not None
    assert len(whole.trace.read.values) == whole.stats.prompt_tokens
    *_, last = engine.stream(prompt(8), max_tokens=9, trace=True)
    assert last.generation is not None
    assert last.generation.trace is not None
    assert len(last.generation.trace.recomputed) == last.generation.stats.recomputed_tokens > 20
    assert whole.stats.deviation == {}  # the question's attention was measured, no deviations


def test_deviations_of_traced_blends_are_exported(served: str, engine: ServerEngine) -> None:
    told = engine.generate(prompt(41), max_tokens=1, blend={"policy": "hkvd"}, trace=True)
    assert told.trace is not None
    assert told.stats.deviation == told.trace.deviation
    assert 0 < told.stats.deviation["mean"] < told.stats.deviation["p95"]
    time.sleep(0.5)
    assert metric(served, "deviation_mean_count") == 1
    assert metric(served, "deviation_p95_sum") == pytest.approx(told.stats.deviation["p95"])


def test_a_guard_compares_answers_of_the_server(engine: ServerEngine, served: str) -> None:
    """From what a server tells: the most likely tokens, of answers to texts and to token ids."""
    time.sleep(0.5)
    counted = metric(served, "requests_total")
    seen: list[BlendStats] = []
    engine.add_observer(seen.append)
    engine.watch(1.0)
    guard = engine.guard
    assert guard is not None
    try:
        found = []
        for count, (asked, mode, ratio) in enumerate(
            [(prompt(30), "auto", 0.0), (engine._prompt_ids(prompt(31)), "blend", 0.0), (prompt(32), "blend", 1.0)]
        ):
            answer = engine.generate(
                asked, max_tokens=5, blend={"mode": mode, "min_reused_tokens": 8, "recompute_ratio": ratio}
            )
            assert answer.stats.decision == "blend"
            until = time.monotonic() + 60
            while guard.report().compared == count:
                assert time.monotonic() < until
                assert guard.report().failed == 0
                time.sleep(0.01)
            found.append(guard._found[ratio][-1])
        assert min(found[:2]) > 1e-4
        assert found[2] < 1e-5  # recomputing everything is full prefill
        assert len(seen) == 3  # what the guard asks is not among the answers
        time.sleep(0.5)
        assert metric(served, "requests_total") == counted + 3
    finally:
        guard.close()
        engine.guard, engine._observers = None, ()


def test_a_stop_string_ends_the_answer(engine: ServerEngine) -> None:
    whole = engine.generate(prompt(2), max_tokens=12)
    stop = whole.text[3:6]
    answer = engine.generate(prompt(2), max_tokens=12, stop=[stop])
    assert (answer.text, answer.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert answer.stats.prompt_tokens == whole.stats.prompt_tokens
    assert answer.stats.decision in ("blend", "prefix")


def test_sampling_and_token_ids(engine: ServerEngine) -> None:
    ids = engine._tokenize(prompt(3))
    sampled = [engine.generate(ids, max_tokens=10, temperature=1.0, top_p=0.9, top_k=40, seed=7) for _ in range(2)]
    assert sampled[0].token_ids == sampled[1].token_ids
    assert engine.generate(ids, max_tokens=10).token_ids == engine.generate(prompt(3), max_tokens=10).token_ids


def test_warm_is_idempotent_and_checks_lengths(engine: ServerEngine) -> None:
    new = [random_text(seed, 200) for seed in (200, 201)]
    seen: list[tuple[int, int]] = []
    report = engine.warm([*new, new[0], ""], progress=lambda done, total: seen.append((done, total)))
    assert (report.stored, report.already_there) == (2, 2)
    assert seen[-1] == (4, 4)
    assert engine.warm(new).already_there == 2
    assert engine.evict([*new, "never seen before by anybody"]) == 2
    with pytest.raises(ChunkTooLongError, match="chunk 1 has"):
        engine.warm([new[0], "word " * 5000])
    assert engine.evict(new) == 0  # nothing was prefilled


def test_chunks_by_their_keys(engine: ServerEngine, caplog: pytest.LogCaptureFixture) -> None:
    new = [random_text(seed, 200) for seed in (210, 211)]
    keys = engine.chunk_keys(new)
    assert engine.is_warm([*new, "", CHUNKS[0]]) == [False, False, True, True]
    engine.warm(new)
    assert engine.is_warm(new) == [True, True]
    assert engine.stored_keys() >= {*keys, *engine.chunk_keys(CHUNKS)}
    assert engine._ask("prefetch", [*keys, "no key"]) == {"prefetched": 2}
    engine.prefetch([*new, "never seen before by anybody"])
    while engine._prefetcher._threads:
        time.sleep(0.01)
    assert not [record for record in caplog.records if "prefetch" in record.getMessage()]
    assert engine.evict_keys([*keys, "no key"]) == 2
    assert engine.is_warm(new) == [False, False]
    assert not engine.stored_keys() & set(keys)


def test_templates_and_tokens_are_the_servers(engine: ServerEngine) -> None:
    text = engine.render_chat([{"role": "user", "content": "hello"}])
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert engine.count_tokens("hello world") == 2


def test_chats_with_tools_are_those_of_the_template(engine: ServerEngine, folder: Path, small_smollm2: str) -> None:
    tokenizer = load_tokenizer(small_smollm2, Path(small_smollm2), str(folder / "template.jinja"))
    call = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "é"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "A word.", "tool_call_id": "call00001"},
    ]
    for tools in (None, [TOOL]):
        for add in (True, False):
            expected = render_chat(tokenizer, "smol", messages, tools, add, {})
            assert engine.render_chat(messages, tools=tools, add_generation_prompt=add) == expected
            assert ("Looks a word up." in expected, expected.endswith("assistant\n")) == (bool(tools), add)

    def local(messages: Any, *, tools: Any = None, add_generation_prompt: bool = True) -> str:
        return render_chat(tokenizer, "smol", messages, tools, add_generation_prompt, {})

    assert engine.tool_format == find_tool_format(local, "smol")
    chat = prepare_chat(engine, messages[:1], tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    answer = engine.generate(chat.prompt, max_tokens=40, **chat.sampling)
    assert [(called.name, json.loads(called.arguments)) for called in chat.parse(answer.text).tool_calls] == [
        ("look_up", {})
    ]
    ids = engine._tokenize(chat.prompt)
    assert engine.decode(ids) == chat.prompt  # special tokens too


def test_constrained_answers_are_those_of_the_embedded_engine(
    engine: ServerEngine, embedded: TransformersEngine
) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "logprobs": 3}
    settings["structured_outputs"] = {"json": {"enum": ["the first", "the second"]}}
    plain = engine.generate(prompt(40), max_tokens=2)
    mine, theirs = (one.generate(prompt(41), **settings) for one in (engine, embedded))
    assert json.loads(mine.text) in ("the first", "the second")
    assert (mine.text, mine.token_ids, mine.finish_reason) == (theirs.text, theirs.token_ids, "stop")
    assert mine.stats.segments == theirs.stats.segments == 4
    assert mine.stats.reused_tokens > 100
    assert mine.logprobs is not None and theirs.logprobs is not None
    assert [logprobs.keys() for logprobs in mine.logprobs] == [logprobs.keys() for logprobs in theirs.logprobs]
    assert "".join(engine.stream(prompt(41), **settings)) == mine.text
    for bad in ({"json": {"type": "nonsense"}}, {"regex": "(["}, {"yaml": ""}):
        with pytest.raises(ConfigError) as error:
            engine.generate("x", max_tokens=2, structured_outputs=bad)
        assert len(str(error.value).splitlines()) == 1
    assert engine.generate(prompt(40), max_tokens=2).token_ids == plain.token_ids


def test_bad_requests_are_one_clear_line(engine: ServerEngine) -> None:
    for call, kind in (
        (lambda: engine.generate("word " * 6000, max_tokens=1), PromptTooLongError),
        (lambda: engine.generate([1] * 4000, max_tokens=200), PromptTooLongError),
        (lambda: engine.generate("", max_tokens=1), ConfigError),
        (lambda: engine.generate("x", logprobs=1000), ConfigError),
        (lambda: engine.generate("x", blend={"check_layers": (30,)}), ConfigError),
        (lambda: engine.generate("x", top_q=1), ConfigError),
    ):
        with pytest.raises(kind) as error:
            call()
        assert len(str(error.value).splitlines()) == 1


def test_bad_addresses_names_and_settings(served: str) -> None:
    def load(model: str = "smol", url: str = served, **changes: Any) -> Callable[[], Any]:
        return lambda: load_engine(model, engine="server", base_url=url, **{"namespace": "test", **changes})

    quick = {"timeout": 2.0, "max_retries": 0}
    for call, kind, words in (
        (load("other"), ConfigError, "serves smol, not 'other'"),
        (load(namespace="elsewhere"), ConfigError, "namespace 'test', not 'elsewhere'"),
        (load(url=f"http://127.0.0.1:{free_port()}/v1", engine_args=quick), ServerError, "can't be reached"),
        (load(engine_args={"speed": 1}), ConfigError, "speed"),
        (load(store="here"), ConfigError, "store is the server's"),
        (load(dtype="float32"), ConfigError, "dtype is the server's"),
        (load(blend=BlendConfig(check_layers=(99,))), ConfigError, "check_layers"),
        (lambda: load_engine("smol", engine="server"), ConfigError, "base_url"),
    ):
        with pytest.raises(kind, match=re.escape(words)):
            call()


def test_a_server_that_does_not_answer_is_an_error_within_the_timeout() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        started = time.monotonic()
        with pytest.raises(ServerError, match="did not answer within"):
            load_engine("smol", engine="server", base_url=url, engine_args={"timeout": 1.0, "max_retries": 0})
        assert time.monotonic() - started < 10


# The command line


def test_ingest_and_query_by_way_of_the_server(served: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cacheblend_rag.cli import app

    (tmp_path / "docs").mkdir()
    for n in range(3):
        (tmp_path / "docs" / f"{n}.txt").write_text(f"Note {n} on harbours. {random_text(300 + n, 500)}")
    common = ["--engine", "server", "--base-url", served, "--model", "smol", "--namespace", "test"]
    common += ["--store", str(tmp_path / "catalog")]
    ingest = ["ingest", str(tmp_path / "docs"), *common, "--json"]
    first = CliRunner().invoke(app, ingest)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["stored"] >= 3
    again = json.loads(CliRunner().invoke(app, ingest).stdout)
    assert (again["stored"], again["already_there"]) == (0, json.loads(first.stdout)["stored"])
    asked = CliRunner().invoke(app, ["query", "harbours", *common, "--mode", "blend", "--max-tokens", "4", "--json"])
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["stats"]["decision"] == "blend"


def test_serve_refuses_what_it_can_not_blend(
    make_model: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from cacheblend_rag.cli import app

    windowed = make_model("mistral", hidden_size=128, sliding_window=64)
    for options, words in (
        ([windowed], "sliding window of 64"),
        ([str(tmp_path / "nothing")], "does not exist"),
        ([windowed, "--ratio", "3"], "recompute_ratio"),
        ([windowed, "--on-unsupported", "cry"], "on_unsupported"),
    ):
        result = CliRunner().invoke(app, ["serve", *options, "--store", str(tmp_path / "kv")])
        assert result.exit_code == 1
        assert words in result.stderr
        assert len([line for line in result.stderr.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.slow
def test_a_server_without_the_connector(folder: Path, model: str) -> None:
    with (
        serving([*BARE, model, "--max-model-len", "512"], folder / "plain.log") as url,
        pytest.raises(UnsupportedModelError, match="without CacheBlend"),
    ):
        load_engine(model, engine="server", base_url=url)
