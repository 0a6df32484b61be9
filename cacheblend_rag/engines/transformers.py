"""The embedded engine: a Hugging Face transformers model in this process, on CPU or GPU."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cacheblend_rag.chunks import ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.divergence import divergence
from cacheblend_rag.engines.base import Engine, Progress, Prompt, SamplingParams
from cacheblend_rag.engines.decoding import Sampler, TextStream
from cacheblend_rag.engines.grammar import GrammarCompiler, GrammarMatcher
from cacheblend_rag.engines.model_files import render_chat, tokenize_chunk, tokenize_prompt
from cacheblend_rag.engines.penalties import Penalties
from cacheblend_rag.engines.transformers_costs import measure_costs
from cacheblend_rag.engines.transformers_exactness import Exactness, measure_exactness
from cacheblend_rag.engines.transformers_model import LoadedModel, load_model
from cacheblend_rag.engines.transformers_reader import KVDeviations, PromptReader
from cacheblend_rag.errors import AnswerTimeoutError, ConfigError
from cacheblend_rag.guard import Answered
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.model_profile import read_question_layers
from cacheblend_rag.prefetching import Prefetcher
from cacheblend_rag.primer import DEFAULT_PRIMER
from cacheblend_rag.stats import BlendStats, FinishReason, Generation, StreamPiece, WarmReport
from cacheblend_rag.store import ChunkStore, MemoryStore, TieredStore
from cacheblend_rag.store.codecs import check_codec
from cacheblend_rag.structured import structural_tag

logger = logging.getLogger(__name__)

_COMPARED = 16  # tokens of an answer that a guard compares


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the model expects of given continuations of a prompt.

    Attributes:
        logits: For each continuation float32 ``[tokens, vocabulary]`` on the model's device: row n belongs to its token
            n, after the prompt and the tokens before it.
        token_ids: The continuations.
        stats: How the prompt was read; there is no first token.
    """

    logits: list[torch.Tensor]
    token_ids: list[list[int]]
    stats: BlendStats


class TransformersEngine(Engine):
    """See :class:`~cacheblend_rag.engines.base.Engine`; made by :func:`cacheblend_rag.load_engine`.

    Threads may share it: passes of the model are serialised one by one, so concurrent answers interleave token by
    token.

    Attributes:
        library: The warm chunks.
        counts: How often each decision was taken, and the faults survived: ``chunk_fault`` (a matched chunk could not
            be read) and ``blend_fault`` (an exception in the blend; the prompt was prefilled).
    """

    _at_once = 8  # each holds the KV of its prompt

    def __init__(
        self,
        model: str,
        *,
        store: ChunkStore,
        blend: BlendConfig,
        dtype: str,
        device: str,
        primer: str | None,
        namespace: str,
        codec: str,
        chat_template: str | None,
        engine_args: Mapping[str, Any],
    ) -> None:
        check_codec(codec)
        self.model_name = model
        self._lock = threading.Lock()
        self._model: LoadedModel | None = load_model(
            model, dtype=dtype, device=device, chat_template=chat_template, model_args=dict(engine_args)
        )
        self.context_window = self._loaded.context_window
        self.num_layers = self._loaded.kv_shape[0]
        blend.check_layer_numbers(self.num_layers)
        primer_ids = tokenize_prompt(self._loaded.tokenizer, DEFAULT_PRIMER if primer is None else primer)
        self._chunk_room = self._loaded.full_attention_tokens - len(primer_ids)
        if self._chunk_room < 1:
            raise ConfigError(f"the primer has {len(primer_ids)} tokens, which leaves no room for chunks: shorten it")
        fingerprint = dataclasses.replace(self._loaded.fingerprint, codec=codec)
        self.scope = ChunkScope(namespace, fingerprint, tuple(primer_ids.tolist()))
        self._question_layers = read_question_layers(store, fingerprint.weights, self.num_layers)
        self.blend = blend.or_question_layers(self._question_layers)
        self._library = ChunkLibrary(store, self.scope)
        self._prefetcher = Prefetcher(self._bring, batch=1)
        self._prompts: PromptReader | None = PromptReader(self._loaded, self._library)
        self._reader.costs = measure_costs(self._loaded, self._reader, self.scope)
        self.counts: Counter[str] = self._reader.counts
        generation_config = self._loaded.model.generation_config
        eos = generation_config.eos_token_id if generation_config else None
        ends = {*(eos if isinstance(eos, list) else [eos]), self._loaded.tokenizer.eos_token_id}
        self._eos: set[int] = {token for token in ends if token is not None}
        self._grammars: GrammarCompiler | None = None  # made for the first constrained answer
        logger.info(
            "model %s (%s on %s), policy %s, recompute_ratio %s, store %s",
            model,
            self._loaded.fingerprint.dtype,
            self._loaded.model.device,
            blend.policy,
            blend.recompute_ratio,
            store,
        )
        logger.info("beside its tokens, %s", self._reader.costs)
        logger.info("memory on %s: %s", self._loaded.model.device, self._loaded.plan_memory(_memory_of(store)))

    def beside(self, store: ChunkStore) -> TransformersEngine:
        """An engine of the same loaded model with another store, so that nothing is tried in the user's.

        Closing it closes its store, and leaves this engine as it is.
        """
        other = copy.copy(self)
        other._library = ChunkLibrary(store, self.scope)
        other._prefetcher = Prefetcher(other._bring, batch=1)
        other._observers = ()
        other.guard = None
        other._prompts = self._reader.beside(other._library)
        other.counts = other._reader.counts
        return other

    @property
    def library(self) -> ChunkLibrary:
        """See the class."""
        self._check_open()
        return self._library

    @property
    def _loaded(self) -> LoadedModel:
        model = self._model
        self._check_open()
        assert model is not None  # only close() takes it away
        return model

    @property
    def _reader(self) -> PromptReader:
        reader = self._prompts
        self._check_open()
        assert reader is not None
        return reader

    def warm(self, chunks: Sequence[str], *, progress: Progress | None = None) -> WarmReport:
        """See :meth:`Engine.warm`. A text without tokens has nothing to store and counts as already there."""
        started = time.perf_counter()
        encoded = self._encode_chunks(chunks)
        self._check_chunks(encoded, self._chunk_room)
        stored = tokens = size = 0
        for done, ids in enumerate(encoded, start=1):
            if len(ids) and not self.library.is_warm(ids):
                with self._lock:
                    chunk = self._reader.read_chunk(ids)
                size += self.library.store.put(chunk)
                tokens += len(ids)
                stored += 1
            if progress is not None:
                progress(done, len(encoded))
        return WarmReport(stored, len(encoded) - stored, tokens, size, time.perf_counter() - started)

    def score(
        self,
        prompt: Prompt,
        continuations: Sequence[Prompt],
        *,
        blend: Mapping[str, Any] | BlendConfig | None = None,
    ) -> Scores:
        """Read a prompt as :meth:`generate` would, then given continuations of it in place of the model's own.

        To measure what a blend changes: compare with the logits for ``blend={"mode": "off"}``. The prompt is read once
        for all continuations.

        Args:
            prompt: Text or token ids.
            continuations: Text (tokenised by itself) or token ids. The prompt and any one must fit the context.
            blend: Settings for this call.

        Raises:
            ConfigError: a bad setting, or token ids outside the vocabulary.
            PromptTooLongError: prompt plus continuation does not fit the context.
        """
        if isinstance(continuations, str):
            raise ConfigError("give a list of continuations, one of them alone too")
        config, _ = self._settings(blend, {})
        ids = self._prompt_ids(prompt)
        token_ids = [self._continuation_ids(continuation) for continuation in continuations]
        longest = max(map(len, token_ids), default=0)
        self._check_length(len(ids), longest)
        device = self._loaded.model.device
        with self._lock, torch.inference_mode():
            read = self._reader.read_prompt(ids, len(ids) + longest, config)
            logits = []
            for continuation in token_ids:
                rows = [read.logits[None]]
                if len(continuation) > 1:
                    rows.append(read.forward.look_ahead(torch.tensor(continuation[:-1], device=device)))
                logits.append(torch.cat(rows)[: len(continuation)])
        if not self._is_comparing:
            self.counts[read.stats.decision] += 1
        return Scores(logits, token_ids, read.stats)

    def _divergence(self, answered: Answered) -> float | None:
        """See :class:`Engine`. Here the logits of all tokens are at hand."""
        given = [answered.token_ids[:_COMPARED]]
        blended = self.score(answered.prompt, given, blend=answered.config)
        if blended.stats.decision != "blend":
            return None
        full = self.score(answered.prompt, given, blend=dataclasses.replace(answered.config, mode="off")).logits[0]
        return divergence(full.double().log_softmax(-1), blended.logits[0]) / len(full)

    def deviations(self, prompt: Prompt) -> KVDeviations:
        """Read a prompt by full prefill, and measure how far known chunks' KV is from that, in every layer.

        To see what a policy should have chosen. It holds the prompt's KV twice.

        Args:
            prompt: Text or token ids.

        Raises:
            PromptTooLongError: the prompt does not fit the context.
        """
        ids = self._prompt_ids(prompt)
        self._check_length(len(ids), 0)
        with self._lock:
            return self._reader.read_deviations(ids)

    def measure_exactness(self, prompt: Prompt, chunks: Sequence[str]) -> Exactness:
        """Measure whether blending this model is exact where it has to be. The engine's store is left alone.

        Args:
            prompt: Text or token ids.
            chunks: Texts that it holds.
        """
        ids, encoded = self._prompt_ids(prompt), self._encode_chunks(chunks)
        self._check_length(len(ids), 0)
        with self._lock:
            return measure_exactness(self._loaded, self.scope, encoded, ids)

    @property
    def token_bytes(self) -> int:
        """Bytes of the KV of a token, as the model has it."""
        return self._loaded.plan_memory(0).token

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._loaded.model.device

    def evict(self, chunks: Sequence[str]) -> int:
        """See :meth:`Engine.evict`."""
        return sum(map(self.library.evict, self._encode_chunks(chunks)))

    def evict_keys(self, keys: Sequence[str]) -> int:
        """See :meth:`Engine.evict_keys`."""
        return sum(map(self.library.evict_key, keys))

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
        options = {**(chat_template_kwargs or {}), "continue_final_message": continue_final_message}
        return render_chat(self._loaded.tokenizer, self.model_name, messages, tools, add_generation_prompt, options)

    def pieces(self, prompt: str) -> list[str]:
        """The text of each token of a prompt; of a character that several tokens make, the last has it."""
        stream = TextStream(self._loaded.tokenizer, [], SamplingParams(skip_special_tokens=False))
        return [stream.add(token) for token in self.token_ids(prompt)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`Engine.decode`."""
        return str(self._loaded.tokenizer.decode(list(token_ids)))

    def count_tokens(self, text: str) -> int:
        """See :meth:`Engine.count_tokens`."""
        return len(tokenize_chunk(self._loaded.tokenizer, text))

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._closed = True
        self._stop_background()
        self._library.store.close()
        # What holds the weights and the primer's KV.
        self._model = self._prompts = None

    def _encode_chunks(self, chunks: Sequence[str]) -> list[TokenIds]:
        return [tokenize_chunk(self._loaded.tokenizer, text) for text in chunks]

    def _held(self, keys: Sequence[str]) -> set[str]:
        return set(filter(self.library.holds, keys))

    def _keys_since(self, cursor: int) -> tuple[int, list[str]]:
        return self.library.keys_since(cursor)

    def _bring(self, chunks: list[str]) -> None:
        for key in self.chunk_keys(chunks):
            self._reader.meter.bring(key, self.library.store.prefetch)

    def _prompt_ids(self, prompt: Prompt) -> TokenIds:
        if isinstance(prompt, str):
            return tokenize_prompt(self._loaded.tokenizer, prompt)
        self._check_vocabulary(prompt, "the prompt")
        return np.asarray(prompt, np.int32)

    def _continuation_ids(self, continuation: Prompt) -> list[int]:
        if isinstance(continuation, str):
            return [int(token) for token in tokenize_chunk(self._loaded.tokenizer, continuation)]
        self._check_vocabulary(continuation, "a continuation")
        return list(continuation)

    def _check_vocabulary(self, token_ids: Sequence[int], what: str) -> None:
        vocabulary = self._loaded.model.config.vocab_size
        if len(token_ids) and not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
            raise ConfigError(f"{what}: there are token ids outside the model's vocabulary of {vocabulary}")

    def _matcher(self, params: SamplingParams) -> GrammarMatcher | None:
        if params.structured_outputs is None:
            return None
        if self._grammars is None:
            vocabulary = self._loaded.model.config.vocab_size
            self._grammars = GrammarCompiler(self._loaded.tokenizer, vocabulary, self._eos)
        return self._grammars.matcher(structural_tag(params.structured_outputs))

    def _answer(self, prompts: Sequence[Prompt], config: BlendConfig, params: SamplingParams) -> list[Generation]:
        """The prompts are answered one after the other: only one holds KV."""
        answers = []
        for prompt in prompts:
            *_, last = self._pieces(prompt, config, params)
            assert last.generation is not None  # a stream ends with one
            answers.append(last.generation)
        return answers

    def _pieces(self, prompt: Prompt, config: BlendConfig, params: SamplingParams) -> Iterator[StreamPiece]:
        started = time.perf_counter()
        ids = self._prompt_ids(prompt)
        self._check_length(len(ids), params.max_tokens)
        total = len(ids) + params.max_tokens
        tokenized = time.perf_counter()
        matcher = self._matcher(params)
        self._check_vocabulary([*params.stop_token_ids, *(params.logit_bias or {})], "stop_token_ids and logit_bias")
        with self._lock:
            is_traced = params.trace or logger.isEnabledFor(logging.DEBUG)
            prompt_read = self._reader.read_prompt(ids, total, config, trace=is_traced)
        stats = prompt_read.stats
        stats.match += tokenized - started
        stats.started = time.time() - (time.perf_counter() - started)
        self.counts[stats.decision] += 1
        sampler = Sampler(params, self._loaded.model.device)
        end_ids = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}
        prompt_ids = ids.tolist()
        penalties = Penalties(params, prompt_ids, end_ids)
        text = TextStream(self._loaded.tokenizer, prompt_ids, params)
        token_ids: list[int] = []
        logprobs: list[dict[int, float]] = []
        finish_reason: FinishReason | None = None
        ready = time.perf_counter()
        end = math.inf if params.timeout is None else started + params.timeout
        logits = prompt_read.logits
        while True:
            if time.perf_counter() > end:
                raise AnswerTimeoutError(f"the answer took more than the timeout of {params.timeout} s")
            allowed = logits if matcher is None else matcher.constrain(logits)
            token, token_logprobs = sampler.choose(allowed, penalties.apply(allowed))
            penalties.add(token)
            complete = matcher is not None and matcher.accept(token)
            if not token_ids:
                now = time.perf_counter()
                stats.first_token = now - ready
                stats.ttft = now - started
                if logger.isEnabledFor(logging.DEBUG):
                    logger.debug("%s", stats.line(prompt_read.trace.score_range if prompt_read.trace else ()))
            token_ids.append(token)
            if token_logprobs is not None:
                logprobs.append(token_logprobs)
            piece = "" if token in end_ids or complete else text.add(token)
            if token in end_ids or text.stopped or complete:
                finish_reason = "stop"
            elif len(token_ids) == params.max_tokens:
                finish_reason = "length"
            if finish_reason is not None:
                break
            if piece:
                handed_over = time.perf_counter()
                yield StreamPiece(piece)
                end += time.perf_counter() - handed_over
            with self._lock, torch.inference_mode():
                logits = prompt_read.forward.decode(token)
        self._finished(Answered(prompt_ids, token_ids, config), stats)
        piece += text.finish()
        yield StreamPiece(
            piece,
            Generation(
                text=text.text,
                token_ids=token_ids,
                finish_reason=finish_reason,
                logprobs=logprobs if params.logprobs is not None else None,
                stats=stats,
                segments=prompt_read.segments,
                trace=prompt_read.trace if params.trace else None,
            ),
        )


def _memory_of(store: ChunkStore) -> int:
    """Most bytes of chunk KV that a store keeps in memory."""
    memory = store.memory if isinstance(store, TieredStore) else store
    return memory.max_bytes if isinstance(memory, MemoryStore) else 0
