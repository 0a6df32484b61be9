"""The embedded engine: a Hugging Face transformers model in this process, on CPU or GPU."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from cacheblend_rag.chunks import ChunkScope, TokenIds
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engines.base import Engine, Progress, Prompt, SamplingParams
from cacheblend_rag.engines.decoding import Sampler, TextStream
from cacheblend_rag.engines.transformers_model import LoadedModel, load_model
from cacheblend_rag.engines.transformers_reader import PromptReader
from cacheblend_rag.errors import ChunkTooLongError, ConfigError, PromptTooLongError
from cacheblend_rag.library import ChunkLibrary
from cacheblend_rag.primer import DEFAULT_PRIMER
from cacheblend_rag.stats import FinishReason, Generation, StreamPiece, WarmReport
from cacheblend_rag.store import ChunkStore

logger = logging.getLogger(__name__)


class TransformersEngine(Engine):
    """See :class:`~cacheblend_rag.engines.base.Engine`; made by :func:`cacheblend_rag.load_engine`.

    Threads may share it: passes of the model are serialised one by one, so concurrent answers interleave token by
    token.

    Attributes:
        library: The warm chunks.
        counts: How often each decision was taken, and the faults survived: ``chunk_fault`` (a matched chunk could not
            be read) and ``blend_fault`` (an exception in the blend; the prompt was prefilled).
    """

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
        engine_args: Mapping[str, Any],
    ) -> None:
        self.model_name = model
        self.blend = blend
        self._lock = threading.Lock()
        self._loaded: LoadedModel = load_model(model, dtype=dtype, device=device, model_args=dict(engine_args))
        self.context_window = self._loaded.context_window
        self._check_layers(blend)
        primer_ids = self._tokenize(DEFAULT_PRIMER if primer is None else primer)
        self._chunk_room = self._loaded.full_attention_tokens - len(primer_ids)
        if self._chunk_room < 1:
            raise ConfigError(f"the primer has {len(primer_ids)} tokens, which leaves no room for chunks: shorten it")
        self.scope = ChunkScope(namespace, self._loaded.fingerprint, tuple(primer_ids.tolist()))
        self.library = ChunkLibrary(store, self.scope)
        self._reader = PromptReader(self._loaded, self.library)
        self.counts: Counter[str] = self._reader.counts
        generation_config = self._loaded.model.generation_config
        eos = generation_config.eos_token_id if generation_config else None
        self._eos = {*(eos if isinstance(eos, list) else [eos]), self._loaded.tokenizer.eos_token_id}
        logger.info(
            "model %s (%s on %s), policy %s, recompute_ratio %s, store %s",
            model,
            self._loaded.fingerprint.dtype,
            self._loaded.model.device,
            blend.policy,
            blend.recompute_ratio,
            store,
        )

    def warm(self, chunks: Sequence[str], *, progress: Progress | None = None) -> WarmReport:
        """See :meth:`Engine.warm`. A text without tokens has nothing to store and counts as already there."""
        started = time.perf_counter()
        encoded = [self._tokenize_chunk(text) for text in chunks]
        for index, ids in enumerate(encoded):
            if len(ids) > self._chunk_room:
                raise ChunkTooLongError(
                    f"chunk {index} has {len(ids)} tokens, but only {self._chunk_room} fit the model's context behind "
                    "the primer: split it into smaller chunks"
                )
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

    def evict(self, chunks: Sequence[str]) -> int:
        """See :meth:`Engine.evict`."""
        return sum(self.library.evict(self._tokenize_chunk(text)) for text in chunks)

    def generate(  # type: ignore[override]  # the overloads of the base class describe it
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        blend: Mapping[str, Any] | BlendConfig | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """See :meth:`Engine.generate`. The prompts of a list are answered one after the other: only one holds KV."""
        config, params = self._settings(blend, sampling)
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int | np.integer)):
            return self._answer(cast(Prompt, prompt), config, params)
        return [self._answer(one, config, params) for one in cast(Sequence[Prompt], prompt)]

    def stream(
        self, prompt: Prompt, *, blend: Mapping[str, Any] | BlendConfig | None = None, **sampling: Any
    ) -> Iterator[StreamPiece]:
        """See :meth:`Engine.stream`. Settings are checked at the call, the prompt is read at the first piece."""
        config, params = self._settings(blend, sampling)
        return self._pieces(prompt, config, params)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """See :meth:`Engine.render_chat`."""
        if not self._loaded.tokenizer.chat_template:
            raise ConfigError(f"model {self.model_name!r} has no chat template: write the prompt as plain text")
        conversation = [dict(message) for message in messages]
        return str(self._loaded.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))

    def count_tokens(self, text: str) -> int:
        """See :meth:`Engine.count_tokens`."""
        return len(self._tokenize_chunk(text))

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self.library.store.close()
        # What holds the weights and the primer's KV.
        self.__dict__.pop("_loaded", None)
        self.__dict__.pop("_reader", None)

    def _tokenize(self, text: str) -> TokenIds:
        """As without this package: with special tokens, but no second BOS before that of a rendered chat template."""
        bos = self._loaded.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return np.asarray(self._loaded.tokenizer(text, add_special_tokens=special)["input_ids"], np.int32)

    def _tokenize_chunk(self, text: str) -> TokenIds:
        return np.asarray(self._loaded.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _prompt_ids(self, prompt: Prompt) -> TokenIds:
        if isinstance(prompt, str):
            ids = self._tokenize(prompt)
        else:
            ids = np.asarray(prompt, np.int32)
            vocabulary = self._loaded.model.config.vocab_size
            if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
                raise ConfigError(f"the prompt has token ids outside the model's vocabulary of {vocabulary}")
        if len(ids) == 0:
            raise ConfigError("the prompt has no tokens")
        return ids

    def _settings(
        self, blend: Mapping[str, Any] | BlendConfig | None, sampling: dict[str, Any]
    ) -> tuple[BlendConfig, SamplingParams]:
        config = blend if isinstance(blend, BlendConfig) else self.blend.with_overrides(blend)
        self._check_layers(config)
        known = [field.name for field in dataclasses.fields(SamplingParams)]
        for name in sampling:
            if name not in known:
                raise ConfigError(f"unknown sampling setting {name!r}: known are {', '.join(known)}")
        return config, SamplingParams(**sampling)

    def _check_layers(self, config: BlendConfig) -> None:
        layers = self._loaded.kv_shape[0]
        if config.check_layers[-1] >= layers:
            raise ConfigError(f"check_layers {config.check_layers} must be below {layers}, the layers of this model")

    def _answer(self, prompt: Prompt, config: BlendConfig, params: SamplingParams) -> Generation:
        for piece in self._pieces(prompt, config, params):
            if piece.generation is not None:
                return piece.generation
        raise AssertionError("a stream ends with a generation")

    def _pieces(self, prompt: Prompt, config: BlendConfig, params: SamplingParams) -> Iterator[StreamPiece]:
        started = time.perf_counter()
        ids = self._prompt_ids(prompt)
        total = len(ids) + params.max_tokens
        if total > self.context_window:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens and max_tokens is {params.max_tokens}, but the model's context is "
                f"{self.context_window}: shorten the prompt or lower max_tokens"
            )
        tokenized = time.perf_counter()
        with self._lock:
            prompt_read = self._reader.read_prompt(ids, total, config)
        stats = prompt_read.stats
        stats.match += tokenized - started
        self.counts[stats.decision] += 1
        sampler = Sampler(params, self._loaded.model.device)
        text = TextStream(self._loaded.tokenizer, params.stop)
        token_ids: list[int] = []
        logprobs: list[dict[int, float]] = []
        finish_reason: FinishReason | None = None
        ready = time.perf_counter()
        logits = prompt_read.logits
        while True:
            token, token_logprobs = sampler.choose(logits)
            if not token_ids:
                now = time.perf_counter()
                stats.first_token = now - ready
                stats.ttft = now - started
            token_ids.append(token)
            if token_logprobs is not None:
                logprobs.append(token_logprobs)
            piece = "" if token in self._eos else text.add(token)
            if token in self._eos or text.stopped:
                finish_reason = "stop"
            elif len(token_ids) == params.max_tokens:
                finish_reason = "length"
            if finish_reason is not None:
                break
            if piece:
                yield StreamPiece(piece)
            with self._lock, torch.inference_mode():
                logits = prompt_read.forward.decode(token)
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
            ),
        )
