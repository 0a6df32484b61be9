"""From logits to tokens, and from tokens to text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from tokenizers import Tokenizer
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
_NO_CHARACTER = "\ufffd"  # what bytes that are no character are decoded to


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

    The text is that which continues the prompt's, as in vLLM: for tokenizers that drop the space before the first word
    of a text (those made with sentencepiece), the first token is decoded as it is behind the last tokens of the prompt.

    Args:
        tokenizer: Decodes.
        prompt_ids: What the tokens come after.
        params: Strings that end the text (they are not part of it, nor is anything after them) unless they are complete
            within the first ``min_tokens``, and whether to leave special tokens out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._skip_special_tokens = params.skip_special_tokens
        context = _context(self._tokenizer, prompt_ids, params.skip_special_tokens)
        self._decoder = DecodeStream(ids=context, skip_special_tokens=params.skip_special_tokens)
        self._stop = params.stop
        self._min_tokens = params.min_tokens
        self._count = 0
        self._undecoded: list[int] = []  # the last tokens, if they end in half a character
        self._pending = ""
        self.text = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """New text that is certain: no half characters, nothing that may yet become a stop string."""
        self._count += 1
        known = len(self._pending)
        self._pending += self._decode(token_id)
        if self._count > self._min_tokens:
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
        self._pending += self._tokenizer.decode(self._undecoded, skip_special_tokens=self._skip_special_tokens)
        return self._send(len(self._pending))

    def _decode(self, token_id: int) -> str:
        """The text that a token completes: nothing while it ends in half a character."""
        try:
            text = self._decoder.step(self._tokenizer, token_id)
        except Exception:  # tokenizers has no type for it
            # Bytes that turn out to be no character can change what is before them. As in vLLM, they are left out.
            self._decoder = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            text = self._decoder.step(self._tokenizer, token_id)
        if text:
            self._undecoded.clear()
        else:
            self._undecoded.append(token_id)
        return text or ""

    def _send(self, length: int) -> str:
        piece, self._pending = self._pending[:length], self._pending[length:]
        self.text += piece
        return piece

    def _possible_stop(self) -> int:
        """Characters at the end of the pending text that may be the beginning of a stop string."""
        text = self._pending
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if stop.startswith(text[-n:]))
        return max((n for n in lengths if n <= len(text)), default=0)


def _context(tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
    """The last tokens of a prompt, as many as it takes to decode what follows as behind the whole prompt.

    None if they end in half a character: a stream that begins with it would repeat their text.
    """
    ids, text = list[int](), ""
    for length in (8, 16, 32, 64):  # more while there are only special tokens, or a character is cut
        ids = list(prompt_ids[-length:])
        text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if text and not text.endswith(_NO_CHARACTER):
            return ids
    return [] if text else ids
