"""The client's side of the server engine, with a server that fails as it is told to. tests/vllm/test_server.py has real
ones."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from cacheblend_rag import ServerError, load_engine
from cacheblend_rag.engines.server import ServerEngine
from cacheblend_rag.errors import EngineClosedError, ServerTimeoutError

DESCRIPTION = {
    "context_window": 100,
    "num_layers": 4,
    "fingerprint": {"name": "m", "weights": "w", "config": "c", "tokenizer": "t", "dtype": "float32"},
    "namespace": "default",
    "primer_ids": [1],
    "bos_token": None,
    "blend": {},
}
SLOW = 30.0  # seconds that nobody waits for


class Handler(BaseHTTPRequestHandler):
    """As much of vLLM's API as one answer takes. ``begins``, ``breaks off``, ``stalls``: what happens to a stream,
    whose prompt says so. Everything that is asked besides hangs."""

    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        card = {"id": "m", "object": "model", "created": 0, "owned_by": "us"}
        self._send_json({"object": "list", "data": [card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ours = body.get("kv_transfer_params", {}).get("cacheblend", {})
        if ours.get("describe"):
            self._send_json({"choices": [], "kv_transfer_params": {"cacheblend": DESCRIPTION}})
        elif body.get("stream"):
            self._send_stream(body["prompt"])
        else:
            self.server.ended.wait(SLOW)

    def _send_json(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_stream(self, prompt: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", "1000000")  # a connection that ends before has broken off
        self.end_headers()
        self._send_piece("one ", None)
        if prompt == "stalls":
            self.server.ended.wait(SLOW)
        if prompt != "breaks off":
            self._send_piece("two", "stop")
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _send_piece(self, text: str, reason: str | None) -> None:
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        self.wfile.write(f"data: {json.dumps({'choices': [choice], 'usage': None})}\n\n".encode())
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ended = threading.Event()


@pytest.fixture
def engine() -> Iterator[ServerEngine]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with load_engine("m", engine="server", base_url=url, engine_args={"max_retries": 0}) as engine:
        assert isinstance(engine, ServerEngine)
        yield engine
    server.ended.set()
    server.shutdown()
    server.server_close()


def read(engine: ServerEngine, use_async: bool, prompt: str, **settings: Any) -> Iterator[str]:
    """The pieces of a stream."""
    if not use_async:
        yield from engine.stream(prompt, **settings)
        return
    pieces: AsyncIterator[str] = engine.astream(prompt, **settings)
    with asyncio.Runner() as runner:
        while (piece := runner.run(anext(pieces, None))) is not None:  # type: ignore[arg-type]
            yield piece


both = pytest.mark.parametrize("use_async", [False, True])


@both
def test_a_stream_that_breaks_off_is_told_from_a_server_that_is_gone(engine: ServerEngine, use_async: bool) -> None:
    pieces = read(engine, use_async, "breaks off")
    assert next(pieces) == "one "
    with pytest.raises(ServerError, match="broke off in the middle of its answer"):
        list(pieces)
    engine._base_url = "http://127.0.0.1:9/v1"  # where nobody listens
    with pytest.raises(ServerError, match="can't be reached"):
        engine.count_tokens("text")


@both
def test_a_stream_that_stalls_ends_in_time(engine: ServerEngine, use_async: bool) -> None:
    pieces = read(engine, use_async, "stalls", timeout=0.3)
    assert next(pieces) == "one "
    with pytest.raises(ServerTimeoutError, match=r"sent no more of its answer within 0\.3 s"):
        list(pieces)


@both
def test_the_readers_time_is_no_time_of_the_answer(engine: ServerEngine, use_async: bool) -> None:
    pieces = read(engine, use_async, "begins", timeout=0.3)
    assert next(pieces) == "one "
    time.sleep(0.4)
    assert next(pieces) == "two"


def test_all_that_belongs_to_an_answer_keeps_its_timeout(engine: ServerEngine) -> None:
    started = time.monotonic()
    *_, last = engine.stream("begins", timeout=0.2)  # the server never tells how it read the prompt
    assert last.generation is not None
    assert (last.generation.text, last.generation.stats.reason[:30]) == ("one two", "the engine could not tell how ")
    with pytest.raises(ServerTimeoutError, match=r"did not answer within 0\.2 s"):
        engine.render_chat([{"role": "user", "content": "Hello"}], timeout=0.2)
    assert time.monotonic() - started < SLOW / 3


def test_a_closed_engine_says_so(engine: ServerEngine) -> None:
    begun = engine.stream("begins")
    engine.close()
    engine.close()
    calls: list[Callable[[], object]] = [
        lambda: engine.warm(["text"]),
        lambda: engine.evict(["text"]),
        lambda: engine.evict_keys(["key"]),
        lambda: engine.is_warm(["text"]),
        lambda: engine.chunk_keys(["text"]),
        lambda: engine.stored_keys(),
        lambda: engine.generate("Once"),
        lambda: engine.stream("Once"),
        lambda: next(begun),
        lambda: engine.render_chat([{"role": "user", "content": "Once"}]),
        lambda: engine.decode([1]),
        lambda: engine.count_tokens("Once"),
        lambda: engine.tool_format,
        lambda: asyncio.run(engine.agenerate("Once")),
        lambda: list(read(engine, True, "Once")),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="closed: load it again"):
            call()


def test_event_loops_of_many_threads_share_an_engine_until_it_is_closed(engine: ServerEngine) -> None:
    in_use, closing = threading.Barrier(7), threading.Event()

    async def use() -> bool:
        first = engine._async_client()
        assert engine._async_client() is first
        in_use.wait(60)
        closing.wait()
        try:
            engine._async_client()
        except EngineClosedError:
            return True
        return False

    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(asyncio.run, use()) for _ in range(6)]
        in_use.wait(60)
        assert len(engine._async_clients) == 6
        engine.close()
        closing.set()
        assert all(future.result() for future in futures)
    assert not engine._async_clients
