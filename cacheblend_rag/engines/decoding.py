"""From logits to tokens, and from tokens to text."""

from __future__ import annotations

import operator
from typing import cast

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cacheblend_rag.engines.base import SamplingParams

# What was generated so far: the warpers used here don't look at it.
_NO_HISTORY = torch.LongTensor()


class Sampler:
    """Chooses the next token, greedily or at random.

    Args:
        params: Temperature, min_p, top_k, top_p, seed, logprobs.
        device: Where the logits are.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self._logprobs = params.logprobs
        self._greedy = params.temperature == 0
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(params.temperature))
            if params.min_p > 0:
                self._warpers.append(MinPLogitsWarper(params.min_p))
            if params.top_k > 0:
                self._warpers.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self._warpers.append(TopPLogitsWarper(params.top_p))

    def choose(self, logits: torch.Tensor, changed: torch.Tensor) -> tuple[int, dict[int, float] | None]:
        """The next token, and the log-probabilities asked for.

        Args:
            logits: The model's, over the tokens that a constraint leaves (others are -inf), float32 ``[vocabulary]``:
                log-probabilities are of these.
            changed: The same with penalties: the token is chosen by these.
        """
        if self._greedy:
            token = int(changed.argmax())
        else:
            scores = cast(torch.FloatTensor, changed[None])  # some releases of transformers ask for this type
            probabilities = self._warpers(_NO_HISTORY, scores).softmax(dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        if self._logprobs is None:
            return token, None
        logprobs = logits.log_softmax(dim=-1)
        top = [index for index in logprobs.topk(self._logprobs).indices.tolist() if logits[index] > -torch.inf]
        return token, {index: float(logprobs[index]) for index in dict.fromkeys([*top, token])}


class TextStream:
    """Turns tokens into text as they come, and ends at a stop string.

    Args:
        tokenizer: Decodes.
        params: Strings that end the text (they are not part of it, nor is anything after them) unless they are complete
            within the first ``min_tokens``, and whether to leave special tokens out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        self._decoder = DecodeStream(skip_special_tokens=params.skip_special_tokens)  # holds back half characters
        self._stop = params.stop
        self._min_tokens = params.min_tokens
        self._token_ids: list[int] = []
        self._pending = ""
        self.text = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """New text that is certain: no half characters, nothing that may yet become a stop string."""
        self._token_ids.append(token_id)
        known = len(self._pending)
        self._pending += self._decoder.step(self._tokenizer.backend_tokenizer, token_id) or ""
        if len(self._token_ids) > self._min_tokens:
            # As in vLLM: of those that this token completes, the one that is complete first.
            starts = ((self._pending.find(stop, max(known + 1 - len(stop), 0)), stop) for stop in self._stop)
            found = [(start + len(stop), start) for start, stop in starts if start >= 0]
            if found:
                self.stopped = True
                return self._send(min(found, key=operator.itemgetter(0))[1])
        return self._send(len(self._pending) - self._possible_stop())

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        decoded = str(self._tokenizer.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens))
        self._pending += decoded[len(self.text) + len(self._pending) :]
        return self._send(len(self._pending))

    def _send(self, length: int) -> str:
        piece, self._pending = self._pending[:length], self._pending[length:]
        self.text += piece
        return piece

    def _possible_stop(self) -> int:
        """Characters at the end of the pending text that may be the beginning of a stop string."""
        text = self._pending
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if stop.startswith(text[-n:]))
        return max((n for n in lengths if n <= len(text)), default=0)
