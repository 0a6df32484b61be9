"""Runs vLLM's engine in a thread of its own, for requests from any thread.

vLLM's ``LLMEngine`` is stepped by whoever uses it and wants one thread. Here one thread makes it and steps it while
there are requests; requests of all threads join the same batches, and each gets its outputs in a queue.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cacheblend_rag.errors import AnswerTimeoutError, CacheBlendError, ConfigError, EngineClosedError
from cacheblend_rag.vllm.compat import wake


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of a request.

    Attributes:
        at: ``time.perf_counter()`` when it came.
        value: vLLM's ``RequestOutput``.
    """

    at: float
    value: Any


class Request:
    """A request on its way: iterating yields its outputs as they come, the last one finished.

    Attributes:
        timeout: Seconds it may take; None: no end.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.timeout: float | None = None
        self._started = time.perf_counter()
        self._request_id = request_id
        self._abort = abort
        self._arrived: queue.SimpleQueue[Output | BaseException] = queue.SimpleQueue()
        self._ended = False

    def put(self, output: Output | BaseException) -> None:
        """Called by the engine's thread."""
        self._arrived.put(output)

    def __iter__(self) -> Iterator[Output]:
        while not self._ended:
            output = self._next()
            if isinstance(output, BaseException):
                self._ended = True
                raise output
            self._ended = output.value.finished
            handed_over = time.perf_counter()
            yield output
            self._started += time.perf_counter() - handed_over  # the reader's time does not count

    def _next(self) -> Output | BaseException:
        if self.timeout is None:
            return self._arrived.get()
        try:
            return self._arrived.get(timeout=max(self._started + self.timeout - time.perf_counter(), 0))
        except queue.Empty:
            raise AnswerTimeoutError(f"the answer took more than the timeout of {self.timeout} s") from None

    def close(self) -> None:
        """Abort the request, unless it has ended."""
        if not self._ended:
            self._ended = True
            self._abort(self._request_id)


class EngineThread:
    """An engine and the thread that runs it.

    Args:
        make_engine: Makes vLLM's ``LLMEngine``; called in the new thread, since vLLM binds the thread it starts in to
            cores.

    Raises:
        Exception: whatever making the engine raises.
    """

    def __init__(self, make_engine: Callable[[], Any]) -> None:
        self._commands: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._requests: dict[str, Request] = {}
        self._lock = threading.Lock()
        self._end: BaseException | None = None
        self.engine: Any = None
        started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(make_engine, started), name="vllm", daemon=True)
        self._thread.start()
        error = started.get()
        if error is not None:
            raise error

    def send(self, request_id: str, prompt_ids: list[int], params: Any, salt: str | None = None) -> Request:
        """Send a request.

        Args:
            request_id: Not in use.
            prompt_ids: The prompt.
            params: vLLM's ``SamplingParams``.
            salt: Only requests of the same find its blocks in the prefix cache.

        Raises:
            EngineClosedError: the engine is closed.
            CacheBlendError: it has died.
        """
        request = Request(request_id, self._send_abort)
        prompt: dict[str, Any] = {"prompt_token_ids": prompt_ids}
        if salt is not None:
            prompt["cache_salt"] = salt
        arrived = time.time()

        def add(engine: Any) -> None:
            try:
                engine.add_request(request_id, prompt, params, arrival_time=arrived)
            except Exception as error:  # of several kinds, by vLLM's release
                del self._requests[request_id]
                refused = ConfigError(f"vLLM refuses the request: {' '.join(str(error).split())}")
                refused.__cause__ = error
                request.put(refused)

        with self._lock:
            if self._end is not None:
                raise _ended(self._end) from self._end
            self._requests[request_id] = request
            self._command(add)
        return request

    def close(self) -> None:
        """End the engine; closing twice does nothing."""
        self._command(None)
        self._thread.join()

    def _send_abort(self, request_id: str) -> None:
        def abort(engine: Any) -> None:
            if self._requests.pop(request_id, None) is not None:
                engine.abort_request([request_id])

        self._command(abort)

    def _command(self, command: Callable[[Any], None] | None) -> None:
        self._commands.put(command)
        if (engine := self.engine) is not None:  # it has not ended
            wake(engine)

    def _run(self, make_engine: Callable[[], Any], started: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            engine = self.engine = make_engine()
        except BaseException as error:
            started.put(error)
            return
        started.put(None)
        end: BaseException = EngineClosedError("the engine is closed: load it again")
        try:
            self._serve(engine)
        except BaseException as error:
            end = error
        with self._lock:  # from here on send() refuses: nobody is left without an answer
            self._end = end
            for request in self._requests.values():
                request.put(_ended(end))
            self._requests.clear()
        engine.engine_core.shutdown()
        self.engine = None

    def _serve(self, engine: Any) -> None:
        while True:
            # Waits for a command only while there is nothing to step.
            while not self._commands.empty() or not engine.has_unfinished_requests():
                command = self._commands.get()
                if command is None:
                    return
                command(engine)
            for output in engine.step():
                request = self._requests.get(output.request_id)
                if request is not None:
                    if output.finished:
                        del self._requests[output.request_id]
                    request.put(Output(time.perf_counter(), output))


def _ended(end: BaseException) -> CacheBlendError:
    if isinstance(end, EngineClosedError):
        return EngineClosedError(*end.args)  # a new one for each request: threads raise them
    return CacheBlendError(f"the vLLM engine has ended: {end}")
