"""A client of a vLLM server that runs the connector: the same engine, over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import openai

from cacheblend_rag.chunks import TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines import wire
from cacheblend_rag.engines.base import Progress, Prompt, SamplingParams
from cacheblend_rag.engines.connected import ConnectedEngine
from cacheblend_rag.errors import ConfigError, EngineClosedError, PromptTooLongError, ServerError, ServerTimeoutError
from cacheblend_rag.guard import Answered
from cacheblend_rag.prefetching import Prefetcher
from cacheblend_rag.stats import FinishReason, Generation, StreamPiece, WarmReport
from cacheblend_rag.structured import structural_tag
from cacheblend_rag.vllm.settings import MOST_KEYS, PARAMS_KEY, Action

Client = TypeVar("Client", openai.OpenAI, openai.AsyncOpenAI)

_RULED_OUT = -9999.0  # how vLLM writes the log-probability of a token that a constraint forbids
_NO_PARAMS = SamplingParams()  # the patience that the client was given
_AT_ONCE = 32  # requests of one call that are under way at a time


class ServerEngine(ConnectedEngine):
    """See :class:`~cacheblend_rag.engines.base.Engine`; made by :func:`cacheblend_rag.load_engine`.

    Any number of threads and event loops may share it. ``stats.ttft`` of :meth:`generate` is the server's, that of
    :meth:`stream` is measured here.

    Attributes:
        counts: How often each decision was taken, and ``chunk_fault`` (a matched chunk could not be read).

    Args:
        model: As the server calls it.
        base_url: The server's OpenAI-compatible API, such as ``"http://localhost:8000/v1"``.
        blend: Defaults of every request; None: the server's.
        namespace: Whose chunks the server is expected to read.
        client_args: Arguments of ``openai.OpenAI``, such as ``api_key``, ``timeout`` (seconds, 600 unless given) and
            ``max_retries`` (2 unless given).

    Raises:
        ServerError: the server can't be reached.
        ConfigError: it serves another model or namespace, or refuses the key.
        UnsupportedModelError: it runs without the connector.
    """

    def __init__(
        self, model: str, *, base_url: str, blend: BlendConfig | None, namespace: str, client_args: Mapping[str, Any]
    ) -> None:
        self.model_name = model
        self.counts: Counter[str] = Counter()
        self._base_url = base_url.rstrip("/")
        self._client_args = {"api_key": "none", **client_args}
        try:
            self._client = openai.OpenAI(base_url=self._base_url, **self._client_args)
        except TypeError as error:
            raise ConfigError(f"engine_args are those of openai.OpenAI: {error}") from error
        self._async_clients: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}
        self._lock = threading.Lock()  # for the async clients
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cacheblend")
        self._prefetcher = Prefetcher(self._bring, batch=MOST_KEYS)
        self._numbers = itertools.count()
        self._name = uuid.uuid4().hex
        with self._errors():
            served = [card.id for card in self._client.models.list()]
        if model not in served:
            raise ConfigError(f"the server at {base_url} serves {', '.join(served)}, not {model!r}")
        description = self._ask("describe", True)
        self.context_window = description["context_window"]
        self.num_layers = description["num_layers"]
        self.scope = wire.parse_scope(description)
        self._bos: str | None = description["bos_token"]
        if namespace != self.scope.namespace:
            raise ConfigError(
                f"the server at {base_url} reads chunks of namespace {self.scope.namespace!r}, not {namespace!r}"
            )
        self.blend = blend or BlendConfig().with_overrides(description["blend"])
        self.blend.check_layer_numbers(self.num_layers)

    def warm(self, chunks: Sequence[str], *, progress: Progress | None = None) -> WarmReport:
        """See :meth:`Engine.warm`. The server prefills chunks in its own batches, beside the queries it serves."""
        self._check_open()
        encoded = list(self._pool.map(self._tokenize, chunks))
        self._check_chunks(encoded, self.context_window - len(self.scope.primer_ids) - 1)
        return wire.warm(encoded, lambda new: self._pool.map(lambda ids: self._ask("warm", True, ids), new), progress)

    def evict(self, chunks: Sequence[str]) -> int:
        """See :meth:`Engine.evict`."""
        self._check_open()
        encoded = [ids for ids in self._pool.map(self._tokenize, chunks) if ids]
        return sum(answer["evicted"] for answer in self._pool.map(lambda ids: self._ask("evict", True, ids), encoded))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> str:
        """See :meth:`Engine.render_chat`. The server renders its template."""
        body: dict[str, Any] = {
            "model": self.model_name,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
        }
        if tools:
            body["tools"] = [dict(tool) for tool in tools]
        params = SamplingParams(timeout=timeout)
        return self._detokenize(self._post("tokenize", body, params)["tokens"], params)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`Engine.decode`."""
        return self._detokenize(token_ids)

    def count_tokens(self, text: str) -> int:
        """See :meth:`Engine.count_tokens`."""
        return len(self._tokenize(text))

    def close(self) -> None:
        """Close the connections; the server goes on."""
        with self._lock:
            self._closed = True
            clients, self._async_clients = self._async_clients, {}
        self._stop_background()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()
        for loop, client in clients.items():
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(client.close(), loop)

    async def agenerate(
        self, prompt: Prompt, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> Generation:
        """See :meth:`Engine.agenerate`."""
        config, params = self._settings(blend, sampling)
        request = self._request(prompt, config, params)
        with self._errors(params.timeout):
            client = _with_options(self._async_client(), params)
            response = await client.completions.create(**request)
        return await asyncio.to_thread(self._generation, response, params, request, config)

    async def astream(
        self, prompt: Prompt, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> AsyncIterator[StreamPiece]:
        """See :meth:`Engine.astream`."""
        config, params = self._settings(blend, sampling)
        request = self._request(prompt, config, params, stream=True)
        answer = _Answer(request, config)
        client = _with_options(self._async_client(), params)
        with self._errors(params.timeout):
            stream = await client.completions.create(**request)
        async with stream:
            with self._errors(params.timeout, streaming=True):
                async for chunk in stream:
                    if piece := answer.add(chunk):
                        yield StreamPiece(piece)
        yield await asyncio.to_thread(self._last_piece, answer, params)

    def _answer(self, prompts: Sequence[Prompt], config: BlendConfig, params: SamplingParams) -> list[Generation]:
        """The prompts are sent side by side: the server batches them."""
        requests = [self._request(prompt, config, params) for prompt in prompts]
        responses = self._pool.map(lambda request: self._complete(request, params), requests)
        return [
            self._generation(response, params, request, config)
            for response, request in zip(responses, requests, strict=True)
        ]

    def _read_apart(self, ids: list[int], config: BlendConfig, params: SamplingParams, salt: str) -> Generation:
        request = self._request(ids, config, params, salt=salt)
        return self._generation(self._complete(request, params), params, request, config)

    def _pieces(self, prompt: Prompt, config: BlendConfig, params: SamplingParams) -> Iterator[StreamPiece]:
        request = self._request(prompt, config, params, stream=True)
        answer = _Answer(request, config)
        client = _with_options(self._client, params)
        with self._errors(params.timeout):
            stream = client.completions.create(**request)
        with stream, self._errors(params.timeout, streaming=True):
            for chunk in stream:
                if piece := answer.add(chunk):
                    yield StreamPiece(piece)
        yield self._last_piece(answer, params)

    def _last_piece(self, answer: _Answer, params: SamplingParams) -> StreamPiece:
        """A streamed response carries no ``kv_transfer_params``: the stats are asked for."""
        return StreamPiece("", self._finish(answer, self._report(answer.request_id, params), params))

    def _report(self, request_id: str, params: SamplingParams) -> dict[str, Any] | None:
        """What the connector says of an earlier request; None if it can't be had: the answer is there without it."""
        with contextlib.suppress(ServerError, EngineClosedError):
            response = self._complete(self._action("report", request_id, [0]), params)
            told: dict[str, Any] | None = response.kv_transfer_params
            return told
        return None

    def _request(
        self,
        prompt: Prompt,
        config: BlendConfig,
        params: SamplingParams,
        *,
        stream: bool = False,
        salt: str | None = None,
    ) -> dict[str, Any]:
        """Arguments of ``completions.create``."""
        if not isinstance(prompt, str):
            prompt = [int(token) for token in prompt]
            self._check_length(len(prompt), params.max_tokens)
        elif not prompt:
            raise ConfigError("the prompt has no tokens")
        request: dict[str, Any] = {
            "model": self.model_name,
            "prompt": prompt,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "stop": list(params.stop) or None,
            "logprobs": params.logprobs or 0,  # with the tokens' log-probabilities come their ids
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "logit_bias": {str(token): bias for token, bias in (params.logit_bias or {}).items()} or None,
            "extra_body": {
                "min_p": params.min_p,
                "repetition_penalty": params.repetition_penalty,
                "min_tokens": params.min_tokens,
                "ignore_eos": params.ignore_eos,
                "stop_token_ids": list(params.stop_token_ids),
                "top_k": max(params.top_k, 0),
                "return_tokens_as_token_ids": True,
                "skip_special_tokens": params.skip_special_tokens,
                "add_special_tokens": not isinstance(prompt, str) or self._needs_special(prompt),
                "kv_transfer_params": wire.blend_params(
                    config,
                    f"{self._name}-{next(self._numbers)}",
                    trace=params.trace,
                    uncounted=salt is not None,
                ),
            },
        }
        if salt is not None:
            request["extra_body"]["cache_salt"] = salt
        if params.structured_outputs is not None:
            tag = structural_tag(params.structured_outputs)
            request["extra_body"]["structured_outputs"] = {"structural_tag": tag}
        if stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        return request

    def _action(self, action: str, value: Any, ids: list[int]) -> dict[str, Any]:
        """Arguments of ``completions.create`` that ask the connector something."""
        params = wire.action_params(action, value)
        return {
            "model": self.model_name,
            "prompt": ids,
            "max_tokens": 1,
            "extra_body": {"kv_transfer_params": params},
        }

    def _ask(self, action: Action, value: Any, ids: Sequence[int] = (0,)) -> dict[str, Any]:
        response = self._complete(self._action(action, value, list(ids)))
        return wire.parse_answer(response.kv_transfer_params)

    def _complete(self, request: dict[str, Any], params: SamplingParams = _NO_PARAMS) -> Any:
        self._check_open()
        with self._errors(params.timeout):
            return _with_options(self._client, params).completions.create(**request)

    def _generation(
        self, response: Any, params: SamplingParams, request: Mapping[str, Any], config: BlendConfig
    ) -> Generation:
        """The answer in a response that was not streamed."""
        answer = _Answer(request, config)
        answer.add(response)
        told = response.kv_transfer_params
        if told is None:  # a stop string ended the answer before vLLM's scheduler knew: the stats are asked for
            told = self._report(answer.request_id, params)
        return self._finish(answer, told, params)

    def _finish(self, answer: _Answer, told: Mapping[str, Any] | None, params: SamplingParams) -> Generation:
        ours = (told or {}).get(PARAMS_KEY)
        stats = wire.parse_stats(ours, answer.prompt_tokens)
        if answer.streamed:
            stats.started, stats.ttft = answer.started, answer.ttft
        self._finished(Answered(answer.prompt, answer.token_ids, answer.config), stats)
        return Generation(
            text=answer.text,
            token_ids=answer.token_ids,
            finish_reason=answer.finish_reason,
            logprobs=answer.logprobs if params.logprobs is not None else None,
            stats=stats,
            trace=wire.parse_trace(ours),
        )

    def _encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        self._check_open()
        return [np.asarray(ids, np.int32) for ids in self._pool.map(self._tokenize, chunks)]

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenize(prompt, special=self._needs_special(prompt))
        return [int(token) for token in prompt]

    def _needs_special(self, prompt: str) -> bool:
        """Whether the server adds special tokens: no second BOS before that of a rendered chat template."""
        return not (self._bos and prompt.startswith(self._bos))

    def _tokenize(self, text: str, *, special: bool = False) -> list[int]:
        body = {"model": self.model_name, "prompt": text, "add_special_tokens": special}
        tokens: list[int] = self._post("tokenize", body)["tokens"]
        return tokens

    def _detokenize(self, token_ids: Sequence[int], params: SamplingParams = _NO_PARAMS) -> str:
        body = {"model": self.model_name, "tokens": [int(token) for token in token_ids]}
        return str(self._post("detokenize", body, params)["prompt"])

    def _post(self, path: str, body: dict[str, Any], params: SamplingParams = _NO_PARAMS) -> dict[str, Any]:
        """Call what vLLM serves besides the OpenAI API, which is one level up."""
        self._check_open()
        root = self._base_url.removesuffix("/v1")
        with self._errors(params.timeout):
            response = _with_options(self._client, params).post(f"{root}/{path}", body=body, cast_to=object)
        assert isinstance(response, dict)
        return response

    def _async_client(self) -> openai.AsyncOpenAI:
        """A client of the running event loop: its connections belong to the loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._check_open()
            if loop not in self._async_clients:
                for ended in [other for other in self._async_clients if other.is_closed()]:
                    del self._async_clients[ended]
                self._async_clients[loop] = openai.AsyncOpenAI(base_url=self._base_url, **self._client_args)
            return self._async_clients[loop]

    @contextlib.contextmanager
    def _errors(self, timeout: float | None = None, *, streaming: bool = False) -> Iterator[None]:
        """What the client library raises, as errors of ours.

        Args:
            timeout: The request's own.
            streaming: The answer has begun.
        """
        try:
            yield
        except RuntimeError:
            self._check_open()  # closed meanwhile, and the connections with it; so it may be further down
            raise
        except openai.APITimeoutError as error:
            seconds = self._client.timeout if timeout is None else timeout
            what = "sent no more of its answer" if streaming else "did not answer"
            raise ServerTimeoutError(f"the server at {self._base_url} {what} within {seconds} s") from error
        except openai.APIConnectionError as error:
            self._check_open()
            what = "broke off in the middle of its answer" if streaming else "can't be reached"
            raise ServerError(f"the server at {self._base_url} {what}: {error.__cause__ or error}") from error
        except openai.AuthenticationError as error:
            raise ConfigError(f"the server at {self._base_url} refuses the api_key: give it in engine_args") from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            message = _message(error)
            kind = PromptTooLongError if "context length" in message or "max_model_len" in message else ConfigError
            raise kind(f"the server refuses the request: {message}") from error
        except openai.APIStatusError as error:
            raise ServerError(
                f"the server at {self._base_url} answers {error.status_code}: {_message(error)}"
            ) from error
        except openai.APIError as error:  # in the middle of a stream
            raise ServerError(f"the server at {self._base_url} broke off: {error.message}") from error


class _Answer:
    """What has come of an answer so far.

    Args:
        request: Arguments of ``completions.create``.
        config: The blend's, which are among them.
    """

    def __init__(self, request: Mapping[str, Any], config: BlendConfig) -> None:
        self.prompt: str | list[int] = request["prompt"]
        self.config = config
        self.request_id: str = request["extra_body"]["kv_transfer_params"][PARAMS_KEY]["id"]
        self.streamed = bool(request.get("stream"))
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, float]] = []
        self.finish_reason: FinishReason = "length"
        self.prompt_tokens = 0
        self.ttft = 0.0
        self.started = time.time()
        self._started = time.perf_counter()

    def add(self, response: Any) -> str:
        """Take in a response, or a chunk of a streamed one; returns its text."""
        self.ttft = self.ttft or time.perf_counter() - self._started
        if response.usage is not None:
            self.prompt_tokens = response.usage.prompt_tokens
        if not response.choices:
            return ""
        choice = response.choices[0]
        if choice.finish_reason is not None:
            if choice.finish_reason not in ("stop", "length"):
                raise ServerError(f"the server ended the request: {choice.finish_reason}, see its log")
            self.finish_reason = choice.finish_reason
        if choice.logprobs is not None:
            tops = choice.logprobs.top_logprobs or [{}] * len(choice.logprobs.tokens)
            for name, logprob, top in zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, tops, strict=True):
                token = _token_id(name)
                self.token_ids.append(token)
                likely = {_token_id(other): value for other, value in (top or {}).items() if value > _RULED_OUT}
                self.logprobs.append({**likely, token: logprob})
        self.text += choice.text
        return str(choice.text)


def _with_options(client: Client, params: SamplingParams) -> Client:
    """A client that shares its connections and takes a request's own patience."""
    retries = params.max_retries
    if retries is None and params.timeout is not None:
        retries = 0  # or it would be three times the timeout
    options = {"timeout": params.timeout, "max_retries": retries}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return client.with_options(**given) if given else client


def _token_id(name: str) -> int:
    """From ``"token_id:123"``."""
    return int(name.rpartition(":")[2])


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    return str(body.get("message") if isinstance(body, dict) else error)
