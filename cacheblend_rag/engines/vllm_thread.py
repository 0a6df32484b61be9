"""Runs vLLM's engine in a thread of its own, for requests from any thread.

vLLM's ``LLMEngine`` is stepped by whoever uses it and wants one thread. Here one thread makes it and steps it while there
are requests; requests of all threads join the same batches, and each gets its outputs in a queue.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from cacheblend_rag.errors import CacheBlendError

_STOP = object()


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of a request.

    Attributes:
        at: ``time.perf_counter()`` when it came.
        value: vLLM's ``RequestOutput``.
    """

    at: float
    value: Any


class EngineThread:
    """An engine and the thread that runs it.

    Args:
        make_engine: Makes vLLM's ``LLMEngine``; called in the new thread, since vLLM binds the thread it starts in to cores.

    Raises:
        Exception: whatever making the engine raises.
    """

    def __init__(self, make_engine: Callable[[], Any]) -> None:
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outputs: dict[str, queue.SimpleQueue[Output | BaseException]] = {}
        self._dead: BaseException | None = None
        self.engine: Any = None
        started: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(make_engine, started), name="vllm", daemon=True)
        self._thread.start()
        error = started.get()
        if error is not None:
            raise error

    def run(self, request_id: str, prompt_ids: list[int], params: Any) -> Iterator[Output]:
        """Send a request; yields its outputs as they come, the last one finished. Given up, it is aborted.

        Args:
            request_id: Not in use.
            prompt_ids: The prompt.
            params: vLLM's ``SamplingParams``.

        Raises:
            CacheBlendError: the engine is closed or has died.
        """
        outputs: queue.SimpleQueue[Output | BaseException] = queue.SimpleQueue()
        arrived = time.time()

        def add(engine: Any) -> None:
            self._outputs[request_id] = outputs
            try:
                engine.add_request(request_id, {"prompt_token_ids": prompt_ids}, params, arrival_time=arrived)
            except Exception as error:
                del self._outputs[request_id]
                outputs.put(error)

        self._send(add)
        return self._receive(request_id, outputs)

    def call(self, what: Callable[[Any], Any]) -> None:
        """Have something done to the engine between two steps."""
        self._send(what)

    def close(self) -> None:
        """End the engine; closing twice does nothing."""
        if self._thread.is_alive():
            self._commands.put(_STOP)
            self._thread.join()

    def _send(self, command: Any) -> None:
        if self._dead is not None:
            raise CacheBlendError(f"the vLLM engine has ended: {self._dead}") from self._dead
        self._commands.put(command)

    def _receive(self, request_id: str, outputs: queue.SimpleQueue[Output | BaseException]) -> Iterator[Output]:
        finished = False
        try:
            while not finished:
                output = outputs.get()
                if isinstance(output, BaseException):
                    finished = True
                    raise output
                finished = output.value.finished
                yield output
        finally:
            if not finished and self._dead is None:
                self._send(lambda engine: self._abort(engine, request_id))

    def _abort(self, engine: Any, request_id: str) -> None:
        if self._outputs.pop(request_id, None) is not None:
            engine.abort_request([request_id])

    def _run(self, make_engine: Callable[[], Any], started: queue.SimpleQueue[BaseException | None]) -> None:
        try:
            engine = self.engine = make_engine()
        except BaseException as error:
            started.put(error)
            return
        started.put(None)
        end: BaseException = CacheBlendError("it was closed")
        try:
            self._serve(engine)
        except BaseException as error:
            end = error
        self._dead = end
        for outputs in self._outputs.values():
            outputs.put(CacheBlendError(f"the vLLM engine has ended: {end}"))
        self._outputs.clear()
        engine.engine_core.shutdown()
        del self.engine

    def _serve(self, engine: Any) -> None:
        while True:
            # Waits for a command only while there is nothing to step.
            while not self._commands.empty() or not engine.has_unfinished_requests():
                command = self._commands.get()
                if command is _STOP:
                    return
                command(engine)
            for output in engine.step():
                outputs = self._outputs.get(output.request_id)
                if outputs is not None:
                    if output.finished:
                        del self._outputs[output.request_id]
                    outputs.put(Output(time.perf_counter(), output))
