"""Changes to logits that depend on what prompt and answer hold, as vLLM makes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from cacheblend_rag.engines.sampling import SamplingParams


class Penalties:
    """Penalties, biases and the shortest answer, for one answer.

    Args:
        params: See :class:`SamplingParams`.
        prompt_ids: The prompt.
        end_ids: Tokens that end the answer.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Collection[int]) -> None:
        self._params = params
        self._prompt_ids = prompt_ids
        self._end_ids = sorted(end_ids)
        self._answer_ids: list[int] = []
        self._penalises = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)

    def add(self, token_id: int) -> None:
        """Take in a token of the answer."""
        self._answer_ids.append(token_id)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Changed logits; the same object if nothing changes.

        Args:
            logits: float32 ``[vocabulary]``.
        """
        params = self._params
        is_too_short = len(self._answer_ids) < params.min_tokens
        if not (self._penalises or is_too_short or params.logit_bias):
            return logits
        changed = logits.clone()
        if is_too_short:
            changed[self._end_ids] = -torch.inf
            if not changed.isfinite().any():  # a constraint allows nothing but the end
                changed = logits.clone()
        for token, bias in (params.logit_bias or {}).items():
            changed[token] += bias
        if self._penalises:
            answer = torch.tensor(self._answer_ids, dtype=torch.long, device=logits.device)
            prompt = torch.tensor(self._prompt_ids, dtype=torch.long, device=logits.device)
            counts = torch.bincount(answer, minlength=len(logits))
            seen = torch.bincount(prompt, minlength=len(logits)) + counts > 0
            factor = torch.where(changed > 0, 1 / params.repetition_penalty, params.repetition_penalty)
            changed = torch.where(seen, changed * factor, changed)
            changed -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        return changed
