"""How tokens are chosen, and what is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.structured import structural_tag
from cacheblend_rag.validation import is_number, is_whole


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, named as in vLLM.

    Attributes:
        max_tokens: Most tokens to generate, at least 1.
        temperature: 0 is greedy.
        top_p: Keep the most likely tokens up to this total probability, in (0, 1].
        top_k: Keep this many of the most likely tokens; 0 or -1 keeps all.
        seed: Makes sampling repeatable.
        stop: Strings that end the answer; not part of its text.
        logprobs: Return log-probabilities of this many top tokens.
        structured_outputs: What the answer must look like, see :func:`cacheblend_rag.structured.structural_tag`.
        skip_special_tokens: Leave special tokens out of the text.
        min_p: Keep the tokens that are at least this share as likely as the most likely one, in [0, 1].
        presence_penalty: Taken from the logits of tokens that the answer has, in [-2, 2].
        frequency_penalty: The same, for each time the answer has them.
        repetition_penalty: Divides the logits of tokens that prompt or answer has, if they are positive, and multiplies
            them if they are negative; more than 0.
        logit_bias: Added to the logits of some token ids, in [-100, 100].
        min_tokens: Fewest tokens before the answer may end by itself, or by a stop string that is complete after them.
        ignore_eos: Go on after an end-of-sequence token.
        stop_token_ids: Tokens that end the answer, besides the end of sequence; not part of its text.
        timeout: Seconds to wait for the answer, looked at between tokens; with a server, to wait for each of its
            messages. Time that the reader of a stream takes between pieces does not count. None: no end, or what the
            server's client was given.
        max_retries: How often a request that a server did not take is sent again; None: what its client was given,
            or never if there is a ``timeout``.
        trace: Return what the blend measured and chose, see :class:`~cacheblend_rag.trace.BlendTrace`. It changes no
            answer; on a GPU, the host waits for it.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    structured_outputs: Mapping[str, Any] | None = None
    skip_special_tokens: bool = True
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    timeout: float | None = None
    max_retries: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.logit_bias is not None:
            bias = {int(token) if str(token).isdigit() else token: value for token, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)  # in JSON, keys are text
        if any(not isinstance(text, str) or not text for text in stop):
            raise ConfigError(f"stop must be non-empty strings, not {self.stop!r}")
        if not is_whole(self.max_tokens) or self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be a whole number from 1, not {self.max_tokens!r}")
        if not is_number(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature must be a number from 0, not {self.temperature!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be a number in (0, 1], not {self.top_p!r}")
        if not is_whole(self.top_k) or self.top_k < -1:
            raise ConfigError(f"top_k must be a whole number from -1, not {self.top_k!r}")
        if self.seed is not None and not is_whole(self.seed):
            raise ConfigError(f"seed must be a whole number, not {self.seed!r}")
        if self.logprobs is not None and (not is_whole(self.logprobs) or self.logprobs < 0):
            raise ConfigError(f"logprobs must be a whole number from 0, not {self.logprobs!r}")
        if self.structured_outputs is not None:
            structural_tag(self.structured_outputs)
        for name in ("skip_special_tokens", "ignore_eos", "trace"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {value!r}")
        self._check_penalties()
        if self.timeout is not None and (not is_number(self.timeout) or self.timeout <= 0):
            raise ConfigError(f"timeout must be seconds, more than 0, or None, not {self.timeout!r}")
        if self.max_retries is not None and (not is_whole(self.max_retries) or self.max_retries < 0):
            raise ConfigError(f"max_retries must be a whole number from 0, or None, not {self.max_retries!r}")

    def _check_penalties(self) -> None:
        if not is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be a number in [0, 1], not {self.min_p!r}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not is_number(value := getattr(self, name)) or not -2 <= value <= 2:
                raise ConfigError(f"{name} must be a number in [-2, 2], not {value!r}")
        if not is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be a number above 0, not {self.repetition_penalty!r}")
        for token, bias in (self.logit_bias or {}).items():
            if not is_whole(token) or token < 0 or not is_number(bias) or not -100 <= bias <= 100:
                raise ConfigError(f"logit_bias must give token ids numbers in [-100, 100], not {token!r}: {bias!r}")
        if not is_whole(self.min_tokens) or not 0 <= self.min_tokens <= self.max_tokens:
            raise ConfigError(f"min_tokens must be a whole number from 0 to max_tokens, not {self.min_tokens!r}")
        if any(not is_whole(token) or token < 0 for token in self.stop_token_ids):
            raise ConfigError(f"stop_token_ids must be token ids, not {self.stop_token_ids!r}")
