"""Constrained decoding for the embedded engine, by xgrammar: tokens that would break the constraint are ruled out."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerFast

from cacheblend_rag.errors import ConfigError

if TYPE_CHECKING:
    import xgrammar

_CACHE_BYTES = 256 << 20


def check_constraint(structural_tag: str) -> None:
    """Say what is wrong with a constraint, without compiling it for a tokenizer.

    Raises:
        ConfigError: it can't be compiled.
    """
    import xgrammar

    with _compile_errors():
        xgrammar.Grammar.from_structural_tag(structural_tag)


class GrammarCompiler:
    """Compiles structural tags for one tokenizer; what was compiled before is remembered.

    Args:
        tokenizer: The model's.
        vocabulary: Entries of the logits, which may be more than the tokenizer has tokens.
        stop_ids: Tokens that end an answer.

    Raises:
        ConfigError: xgrammar is not installed, or can't handle the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, stop_ids: set[int]) -> None:
        try:
            import xgrammar
        except ImportError as error:
            raise ConfigError(
                f"structured_outputs need xgrammar ({error}): pip install 'cacheblend-rag[structured]'"
            ) from error
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(stop_ids)
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"structured_outputs can't be used with this tokenizer: {_message(error)}") from error
        self._vocabulary = vocabulary
        self._compiler = xgrammar.GrammarCompiler(info, cache_limit_bytes=_CACHE_BYTES)
        self._lock = threading.Lock()

    def matcher(self, structural_tag: str) -> GrammarMatcher:
        """A fresh matcher for one answer.

        Raises:
            ConfigError: the constraint can't be compiled.
        """
        import xgrammar

        with _compile_errors(), self._lock:
            compiled = self._compiler.compile_structural_tag(structural_tag)
        return GrammarMatcher(xgrammar.GrammarMatcher(compiled), self._vocabulary)


class GrammarMatcher:
    """Follows one answer, token by token."""

    def __init__(self, matcher: xgrammar.GrammarMatcher, vocabulary: int) -> None:
        import xgrammar

        self._matcher = matcher
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary)

    def constrain(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits (float32 ``[vocabulary]``) with every token ruled out (-inf) that may not come next.

        Raises:
            ConfigError: none may: the tokenizer has no tokens for what the constraint asks for.
        """
        import xgrammar

        self._matcher.fill_next_token_bitmask(self._mask)
        allowed = logits[None].clone()
        xgrammar.apply_token_bitmask_inplace(allowed, self._mask.to(logits.device))
        if bool(allowed.isneginf().all()):
            raise ConfigError("structured_outputs ask for text that the model has no tokens for")
        return allowed[0]

    def accept(self, token_id: int) -> bool:
        """Take in the token that was chosen; True if it ends the answer, after which nothing may come."""
        self._matcher.accept_token(token_id)
        return self._matcher.is_terminated()


@contextlib.contextmanager
def _compile_errors() -> Iterator[None]:
    """What xgrammar raises for a bad constraint, as an error of ours."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"structured_outputs can't be compiled: {_message(error)}") from error


def _message(error: Exception) -> str:
    """An error of xgrammar in one line, without where in its sources it was raised."""
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", " ".join(str(error).split()))[:500]
