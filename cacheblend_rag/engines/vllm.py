"""vLLM in this process: its own engine, with the connector that blends."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from cacheblend_rag.chunks import TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines import wire
from cacheblend_rag.engines.base import Progress, Prompt, SamplingParams
from cacheblend_rag.engines.connected import ConnectedEngine
from cacheblend_rag.engines.decoding import TextStream
from cacheblend_rag.engines.grammar import check_constraint
from cacheblend_rag.engines.model_files import (
    first_line,
    load_tokenizer,
    render_chat,
    resolve_model,
    tokenize_chunk,
    tokenize_prompt,
)
from cacheblend_rag.engines.vllm_thread import EngineThread, Request
from cacheblend_rag.errors import CacheBlendError, ConfigError
from cacheblend_rag.guard import Answered
from cacheblend_rag.prefetching import Prefetcher
from cacheblend_rag.primer import DEFAULT_PRIMER
from cacheblend_rag.stats import FinishReason, Generation, StreamPiece, WarmReport
from cacheblend_rag.store import ChunkStore, DiskStore, MemoryStore, TieredStore
from cacheblend_rag.structured import structural_tag
from cacheblend_rag.vllm.compat import check_version
from cacheblend_rag.vllm.plugin import CONNECTOR_CONFIG, register
from cacheblend_rag.vllm.settings import MOST_KEYS, PARAMS_KEY, Action, ConnectorSettings
from cacheblend_rag.vllm.support import check_supported

_WARM_AT_ONCE = 256  # warm requests that wait in vLLM at a time


class VllmEngine(ConnectedEngine):
    """See :class:`~cacheblend_rag.engines.base.Engine`; made by :func:`cacheblend_rag.load_engine`.

    Threads may share it: their requests join the same batches.

    Attributes:
        counts: How often each decision was taken, and the faults survived: ``chunk_fault`` (a matched chunk could not
            be read).
    """

    _at_once = 256  # vLLM's own max_num_seqs

    def __init__(
        self,
        model: str,
        *,
        store: ChunkStore | str | None,
        blend: BlendConfig,
        dtype: str,
        device: str,
        primer: str | None,
        namespace: str,
        codec: str,
        chat_template: str | None,
        engine_args: Mapping[str, Any],
    ) -> None:
        check_version()
        register()
        self.model_name = model
        self.counts: Counter[str] = Counter()
        tokenizer = engine_args.get("tokenizer") or model
        revision = engine_args.get("tokenizer_revision") or engine_args.get("revision")
        self._tokenizer = load_tokenizer(tokenizer, resolve_model(tokenizer, revision), chat_template)
        arguments = dict(engine_args)
        settings = ConnectorSettings.parse(
            {
                **_store_settings(store),
                "namespace": namespace,
                "codec": codec,
                "primer": DEFAULT_PRIMER if primer is None else primer,
                "on_unsupported": arguments.pop("on_unsupported", "refuse"),
                "gpu_bytes": arguments.pop("gpu_bytes", 0),
            }
        )
        self._prefetcher = Prefetcher(self._bring, batch=MOST_KEYS)
        self._thread = EngineThread(lambda: _make_engine(model, dtype, device, settings, arguments))
        self._numbers = itertools.count()
        self._name = uuid.uuid4().hex
        config = self._thread.engine.vllm_config.model_config
        self.context_window = config.max_model_len
        self._vocabulary: int = config.get_vocab_size()
        try:
            description = self._ask("describe", True)
            self.num_layers = description["num_layers"]
            self.scope = wire.parse_scope(description)
            # The connector's own defaults are ours but for these, which it has from the model's profile.
            self._question_layers = BlendConfig().with_overrides(description["blend"]).question_layers
            self.blend = blend.or_question_layers(self._question_layers)
            self.blend.check_layer_numbers(self.num_layers)
        except BaseException:
            self.close()
            raise

    def warm(self, chunks: Sequence[str], *, progress: Progress | None = None) -> WarmReport:
        """See :meth:`Engine.warm`. Chunks are prefilled in vLLM's own batches."""
        encoded = [ids.tolist() for ids in self._encode_chunks(chunks)]
        self._check_chunks(encoded, self.context_window - len(self.scope.primer_ids) - 1)

        def ask(new: list[list[int]]) -> Iterator[dict[str, Any]]:
            for first in range(0, len(new), _WARM_AT_ONCE):
                yield from self._ask_all("warm", new[first : first + _WARM_AT_ONCE])

        return wire.warm(encoded, ask, progress)

    def evict(self, chunks: Sequence[str]) -> int:
        """See :meth:`Engine.evict`."""
        encoded = [ids.tolist() for ids in self._encode_chunks(chunks) if len(ids)]
        return sum(answer["evicted"] for answer in self._ask_all("evict", encoded))

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
        """See :meth:`Engine.render_chat`."""
        self._check_open()
        options = {**(chat_template_kwargs or {}), "continue_final_message": continue_final_message}
        return render_chat(self._tokenizer, self.model_name, messages, tools, add_generation_prompt, options)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`Engine.decode`."""
        self._check_open()
        return str(self._tokenizer.decode(list(token_ids)))

    def count_tokens(self, text: str) -> int:
        """See :meth:`Engine.count_tokens`."""
        self._check_open()
        return len(tokenize_chunk(self._tokenizer, text))

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._closed = True
        self._stop_background()
        self._thread.close()

    def _answer(self, prompts: Sequence[Prompt], config: BlendConfig, params: SamplingParams) -> list[Generation]:
        """All prompts wait in vLLM together: it batches them."""
        encoded = [self._encode(prompt, params) for prompt in prompts]
        sent = [self._begin(ids, seconds, config, params) for ids, seconds in encoded]
        answers = []
        try:
            for answer in sent:
                *_, last = self._collect(answer)
                assert last.generation is not None  # a stream ends with one
                answers.append(last.generation)
        finally:
            for answer in sent:
                answer.request.close()
        return answers

    def _read_apart(self, ids: list[int], config: BlendConfig, params: SamplingParams, salt: str) -> Generation:
        self._check_length(len(ids), params.max_tokens)
        sent = self._begin(ids, 0.0, config, params, salt)
        try:
            *_, last = self._collect(sent)
        finally:
            sent.request.close()
        assert last.generation is not None
        return last.generation

    def _pieces(self, prompt: Prompt, config: BlendConfig, params: SamplingParams) -> Iterator[StreamPiece]:
        answer = self._begin(*self._encode(prompt, params), config, params)
        try:
            yield from self._collect(answer)
        finally:
            answer.request.close()

    def _encode(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], float]:
        """Token ids of a prompt that fits, and the seconds it took."""
        started = time.perf_counter()
        ids = self._prompt_ids(prompt)
        self._check_length(len(ids), params.max_tokens)
        return ids, time.perf_counter() - started

    def _begin(
        self, ids: list[int], seconds: float, config: BlendConfig, params: SamplingParams, salt: str | None = None
    ) -> _Sent:
        started = time.perf_counter() - seconds
        request_id = self._new_id()
        asked = wire.blend_params(config, request_id, trace=params.trace, uncounted=salt is not None)
        request = self._send(request_id, ids, params, asked, salt)
        request.timeout = params.timeout
        return _Sent(request, request_id, ids, config, params, started, seconds)

    def _collect(self, sent: _Sent) -> Iterator[StreamPiece]:
        decoder = None if sent.params.stop else TextStream(self._tokenizer, sent.prompt_ids, sent.params)
        text, token_ids, ttft, answer = "", list[int](), 0.0, None
        logprobs: list[dict[int, float]] = []
        finish_reason: FinishReason = "length"
        last = ""
        for output in sent.request:
            completion = output.value.outputs[0]
            ttft = ttft or output.at - sent.started
            piece = completion.text if decoder is None else _decode(decoder, completion)
            text += piece
            token_ids += completion.token_ids
            for entry in completion.logprobs or []:
                logprobs.append({token: found.logprob for token, found in entry.items() if found.logprob > -math.inf})
            if output.value.finished:
                if completion.finish_reason not in ("stop", "length"):
                    raise CacheBlendError(f"vLLM ended the request: {completion.finish_reason}, see its log")
                finish_reason = "stop" if completion.finish_reason == "stop" else "length"
                answer = output.value.kv_transfer_params
                last = piece
            elif piece:
                yield StreamPiece(piece)
        # A stop string ends the answer before vLLM's scheduler knows: the stats are asked for then.
        answer = answer or self._told(self._send_action("report", sent.request_id, [0]))
        told = (answer or {}).get(PARAMS_KEY)
        stats = wire.parse_stats(told, len(sent.prompt_ids))
        stats.match += sent.tokenized
        stats.ttft = ttft
        stats.started = time.time() - (time.perf_counter() - sent.started)
        self._finished(Answered(sent.prompt_ids, token_ids, sent.config), stats)
        yield StreamPiece(
            last,
            Generation(
                text=text,
                token_ids=token_ids,
                finish_reason=finish_reason,
                logprobs=logprobs if sent.params.logprobs is not None else None,
                stats=stats,
                trace=wire.parse_trace(told),
            ),
        )

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = tokenize_prompt(self._tokenizer, prompt).tolist()
            return ids
        if len(prompt) and not 0 <= min(prompt) <= max(prompt) < self._vocabulary:
            raise ConfigError(f"the prompt has token ids outside the model's vocabulary of {self._vocabulary}")
        return [int(token) for token in prompt]

    def _ask_all(self, action: Literal["warm", "evict"], prompts: Sequence[list[int]]) -> Iterator[dict[str, Any]]:
        """Ask the connector to do something with each prompt."""
        sent = [self._send_action(action, True, ids) for ids in prompts]
        try:
            yield from map(wire.parse_answer, map(self._told, sent))
        finally:
            for request in sent:
                request.close()

    def _ask(self, action: Action, value: Any, ids: Sequence[int] = (0,)) -> dict[str, Any]:
        return wire.parse_answer(self._told(self._send_action(action, value, list(ids))))

    def _encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        self._check_open()
        return [tokenize_chunk(self._tokenizer, text) for text in chunks]

    def _send_action(self, action: str, value: Any, ids: list[int]) -> Request:
        return self._send(self._new_id(), ids, SamplingParams(max_tokens=1), wire.action_params(action, value))

    def _told(self, request: Request) -> dict[str, Any] | None:
        """What the connector says of a request, once it has finished."""
        *_, last = request
        told: dict[str, Any] | None = last.value.kv_transfer_params
        return told

    def _send(
        self,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        extra: dict[str, Any],
        salt: str | None = None,
    ) -> Request:
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        structured = None
        if params.structured_outputs is not None:
            tag = structural_tag(params.structured_outputs)
            check_constraint(tag)  # vLLM does not say what is wrong with it
            structured = StructuredOutputsParams(structural_tag=tag)
        return self._thread.send(
            request_id,
            ids,
            VllmSamplingParams(
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=max(params.top_k, 0),
                seed=params.seed,
                stop=list(params.stop),
                # Before its first piece of text, vLLM's detokenizer decodes the whole prompt, tens of milliseconds of a
                # long one. It has to where there are stop strings: only vLLM can end a request whose reader is slow.
                detokenize=bool(params.stop),
                logprobs=params.logprobs,
                skip_special_tokens=params.skip_special_tokens,
                min_p=params.min_p,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                repetition_penalty=params.repetition_penalty,
                logit_bias=dict(params.logit_bias) if params.logit_bias else None,
                min_tokens=params.min_tokens,
                ignore_eos=params.ignore_eos,
                stop_token_ids=list(params.stop_token_ids),
                structured_outputs=structured,
                output_kind=RequestOutputKind.DELTA,
                extra_args={"kv_transfer_params": extra},
            ),
            salt,
        )

    def _new_id(self) -> str:
        return f"{self._name}-{next(self._numbers)}"


@dataclasses.dataclass(frozen=True)
class _Sent:
    request: Request
    request_id: str
    prompt_ids: list[int]
    config: BlendConfig
    params: SamplingParams
    started: float
    tokenized: float


def _decode(decoder: TextStream, completion: Any) -> str:
    """The text of new tokens as vLLM has it: without the token that ends it, or half a character at its end."""
    ended = completion.finish_reason == "stop"
    return "".join(map(decoder.add, completion.token_ids[:-1] if ended else completion.token_ids))


def _make_engine(model: str, dtype: str, device: str, settings: ConnectorSettings, arguments: dict[str, Any]) -> Any:
    """VLLM's engine.

    Raises:
        ConfigError: vLLM refuses an argument or finds no such model.
        UnsupportedModelError: the model can't be blended.
    """
    from vllm import EngineArgs
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    if device not in ("auto", current_platform.device_type):
        raise ConfigError(f"device is {device!r}, but vLLM runs on {current_platform.device_type!r} here: leave it out")
    try:
        engine_args = EngineArgs(
            model=model,
            dtype=dtype,
            kv_transfer_config={
                **CONNECTOR_CONFIG,
                "kv_connector_extra_config": settings.to_extra_config(),
            },
            **{"max_logprobs": -1, "prefix_caching_hash_algo": "xxhash", "disable_log_stats": True, **arguments},
        )
        # With the defaults of vLLM's server. Without a context, they are those of small GPUs: steps of 2048 tokens.
        vllm_config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM can't be set up for {model!r}: {' '.join(str(error).split())}") from error
    if settings.on_unsupported == "refuse":
        check_supported(vllm_config)
    try:
        return LLMEngine.from_vllm_config(vllm_config, disable_log_stats=engine_args.disable_log_stats)
    except Exception as error:
        ensure_kv_transfer_shutdown()  # or vLLM would use the connector of this start for the next engine
        if isinstance(error, RuntimeError | ValueError) and not isinstance(error, CacheBlendError):
            raise CacheBlendError(f"vLLM can't start with {model!r}: {first_line(error)}") from error
        raise


def _store_settings(store: ChunkStore | str | None) -> dict[str, Any]:
    """Where the connector's processes, which may be others than this one, are to open the store."""
    if store is None or isinstance(store, str):
        return {"store": store}
    if isinstance(store, MemoryStore):
        return {"memory_bytes": store.max_bytes, "max_bytes": store.max_bytes}
    disk = store.disk if isinstance(store, TieredStore) else store
    if not isinstance(disk, DiskStore):
        raise ConfigError(f"the vLLM engine opens its store itself: give a directory instead of {store!r}")
    memory_bytes = store.memory.max_bytes if isinstance(store, TieredStore) else 0
    settings = {"store": str(disk.directory), "memory_bytes": memory_bytes, "max_bytes": disk.max_bytes}
    store.close()
    return settings
