"""How near the answers of a blend are to full prefill's: by all logits, or by what an engine tells of them."""

from __future__ import annotations

import dataclasses
import secrets
import statistics
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from cacheblend_rag.divergence import TOPS, divergence, divergence_of_tops
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.stats import Generation

ANSWER_TOKENS = 16
"""Most tokens of an answer."""

_OFF = {"mode": "off"}


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How near a blend comes to full prefill, over full prefill's own answer.

    Attributes:
        kl: KL divergence of the next token from full prefill's, nats a token; or the least that it can be.
        agreement: Share of the tokens that are the most likely ones of both.
    """

    kl: float
    agreement: float


class Expected(Protocol):
    """What full prefill makes of one prompt.

    Attributes:
        answer: Full prefill's.
    """

    @property
    def answer(self) -> Generation:
        """See the class."""

    def compare(self, blend: Mapping[str, Any]) -> Nearness:
        """How near the prompt is read with some settings."""


class Comparison(Protocol):
    """A way to compare that an engine allows.

    Attributes:
        is_bound: Whether the KL divergence is the least that it can be, and not what it is.
    """

    is_bound: bool

    def expect(self, prompt: str) -> Expected:
        """Have a prompt answered by full prefill."""

    def unread(self, prompt: str) -> str:
        """The prompt as it may be timed: an engine that remembers prompts has not read it yet."""


class ByLogits:
    """A :class:`Comparison` by the logits of the whole vocabulary.

    Args:
        engine: It remembers no prompts.
    """

    is_bound = False

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    def expect(self, prompt: str) -> Expected:
        """See :class:`Comparison`."""
        return _ExpectedLogits(self._engine, prompt)

    def unread(self, prompt: str) -> str:
        """See :class:`Comparison`."""
        return prompt


class _ExpectedLogits:
    def __init__(self, engine: TransformersEngine, prompt: str) -> None:
        self._engine = engine
        self._prompt = prompt
        self.answer = engine.generate(prompt, max_tokens=ANSWER_TOKENS, blend=_OFF)
        self._logprobs = self._logits(_OFF).double().log_softmax(-1)

    def compare(self, blend: Mapping[str, Any]) -> Nearness:
        """See :class:`Expected`."""
        logits = self._logits(blend)
        same = self._logprobs.argmax(-1) == logits.argmax(-1)
        return Nearness(divergence(self._logprobs, logits) / len(logits), float(same.double().mean()))

    def _logits(self, blend: Mapping[str, Any]) -> torch.Tensor:
        return self._engine.score(self._prompt, [self.answer.token_ids], blend=blend).logits[0]


class ByTopTokens:
    """A :class:`Comparison` by the most likely tokens, for any engine.

    Each token of full prefill's answer is asked for by itself, behind the prompt and the tokens before it. An engine
    with a prefix cache goes on from the blended blocks, as from the turn before in a conversation.

    Args:
        engine: May remember prompts.
    """

    is_bound = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def expect(self, prompt: str) -> Expected:
        """See :class:`Comparison`."""
        return _ExpectedTokens(self._engine, prompt)

    def unread(self, prompt: str) -> str:
        """See :class:`Comparison`. What a prefix cache has begins with the first token."""
        return f"{secrets.token_hex(4)}\n{prompt}"


class _ExpectedTokens:
    def __init__(self, engine: Engine, prompt: str) -> None:
        self._engine = engine
        self._ids = engine.token_ids(prompt)
        self.answer = engine.generate(self._ids, max_tokens=ANSWER_TOKENS, logprobs=TOPS, blend=_OFF)

    def compare(self, blend: Mapping[str, Any]) -> Nearness:
        """See :class:`Expected`."""
        expected, tokens = self.answer.logprobs, self.answer.token_ids
        assert expected is not None  # they were asked for
        asked: dict[str, Any] = {"max_tokens": 1, "logprobs": TOPS, "blend": blend}
        found = [self._engine.generate(self._ids, **asked)]  # first: the others go on from it
        found += self._engine.generate([[*self._ids, *tokens[:count]] for count in range(1, len(tokens))], **asked)
        kl = [divergence_of_tops(full, first_logprobs(one)) for full, one in zip(expected, found, strict=True)]
        same = [one.token_ids[0] == token for one, token in zip(found, tokens, strict=True)]
        return Nearness(statistics.fmean(kl), statistics.fmean(same))


def first_logprobs(answer: Generation) -> dict[int, float]:
    """The log-probabilities of an answer's first token, which were asked for."""
    assert answer.logprobs is not None
    return answer.logprobs[0]
