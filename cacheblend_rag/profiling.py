"""Finds the layers of a model where the question's attention tells best which tokens to recompute.

Full prefill answers each question greedily. Then the same prompt is blended, once for each range of layers, and is
given two answers token by token, full prefill's own and the gold one. What counts is the KL divergence of the
next-token distribution from full prefill's, summed over both. Ranges are compared question by question with the last
half of the layers, which stays the choice unless another does better beyond chance.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import cacheblend_rag
from cacheblend_rag.divergence import divergence
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.errors import CacheBlendError, ChunkTooLongError, ConfigError, PromptTooLongError
from cacheblend_rag.model_profile import ModelProfile
from cacheblend_rag.profiling_data import ProfilingQuestion, passages_of

Layers = tuple[int, int]

MAX_ANSWER_TOKENS = 16
"""Most tokens of full prefill's own answer."""

_CHANCE = 0.05  # of any other range being chosen where none is better
_OFF = {"mode": "off"}
_INSTRUCTION = "Answer the question from the passages, in a few words."
# All of the layers; halves, thirds and quarters; and the later ones of these, shifted towards the middle.
_RANGES = (
    "0 1",
    "0 1/2",
    "1/4 3/4",
    "1/3 2/3",
    "3/8 7/8",
    "1/4 1",
    "1/2 3/4",
    "7/12 11/12",
    "5/8 7/8",
    "2/3 1",
    "3/4 1",
)


@dataclasses.dataclass
class Measurement:
    """What was measured, question by question.

    Attributes:
        full_reuse: KL of a blend that recomputes nothing, in nats, ``[questions]``.
        kl: The same of each range of layers, at one ratio.
        left_out: Why questions could not be measured.
    """

    full_reuse: list[float]
    kl: dict[Layers, list[float]]
    left_out: list[str]


def last_half(num_layers: int) -> Layers:
    """What counts without a profile."""
    return num_layers // 2, num_layers


def candidate_ranges(num_layers: int) -> list[Layers]:
    """The ranges that are compared, the last half first; fewer of them where a model has few layers."""
    bounds = [tuple(round(Fraction(share) * num_layers) for share in shares.split()) for shares in _RANGES]
    return list(dict.fromkeys([last_half(num_layers), *((first, end) for first, end in bounds if first < end)]))


def measure(
    engine: TransformersEngine,
    questions: Sequence[ProfilingQuestion],
    *,
    limit: int | None = None,
    ratio: float,
    progress: Callable[[int, int], None],
) -> Measurement:
    """Measure every range of layers on every question. The passages stay warm in the engine's store.

    Args:
        engine: Runs the model.
        questions: What is asked, and where other passages are drawn from.
        limit: Ask so many of them only, the first ones; None: all.
        ratio: Share of the matched tokens that is recomputed.
        progress: Called with (questions done, questions in all) after each.

    Raises:
        CacheBlendError: no question could be measured.
    """
    ranges = candidate_ranges(engine.num_layers)
    found = Measurement([], {layers: [] for layers in ranges}, [])
    asked = len(questions[:limit])
    for number in range(asked):
        try:
            reuse, *of_ranges = _measure(engine, questions[number], passages_of(questions, number), ranges, ratio)
        except (ChunkTooLongError, PromptTooLongError, _NotBlendedError) as error:
            found.left_out.append(f"question {number + 1}: {error}")
        else:
            found.full_reuse.append(reuse)
            for layers, kl in zip(ranges, of_ranges, strict=True):
                found.kl[layers].append(kl)
        progress(number + 1, asked)
    if not found.full_reuse:
        raise CacheBlendError(f"no question could be measured: {found.left_out[0]}")
    return found


def make_profile(engine: TransformersEngine, found: Measurement, *, ratio: float) -> ModelProfile:
    """The profile of an engine's model, by what was measured of it at some ratio."""
    baseline = last_half(engine.num_layers)
    fingerprint = engine.scope.fingerprint
    reuse = sum(found.full_reuse)
    candidates = [
        {
            "layers": list(layers),
            "kl": sum(kl),
            "median_kl": statistics.median(kl),
            "closure": 1 - sum(kl) / reuse if reuse else None,
            **dict(zip(("wins", "losses"), wins_and_losses(kl, found.kl[baseline]), strict=True)),
        }
        for layers, kl in found.kl.items()
    ]
    measured: dict[str, Any] = {
        "version": cacheblend_rag.__version__,
        "dtype": fingerprint.dtype,
        "recompute_ratio": ratio,
        "questions": len(found.full_reuse),
        "left_out": found.left_out,
        "full_reuse_kl": reuse,
        "candidates": candidates,
    }
    layers = choose(found.kl, baseline)
    return ModelProfile(fingerprint.name, fingerprint.weights, engine.num_layers, layers, measured)


def choose(kl: dict[Layers, list[float]], baseline: Layers) -> Layers:
    """The range with the least KL among those that are better than the baseline beyond chance, or the baseline.

    Better in the sum, and on so many more questions than not that chance would rarely do as much for any of the ranges.
    A few questions with much KL, which decide the sum, don't decide that.

    Args:
        kl: Of each range, ``[questions]``.
        baseline: The range to beat.
    """
    others = [layers for layers in kl if layers != baseline]
    better = [
        layers
        for layers in others
        if sum(kl[layers]) < sum(kl[baseline])
        and _chance_of(*wins_and_losses(kl[layers], kl[baseline])) * len(others) <= _CHANCE
    ]
    return min(better, key=lambda layers: sum(kl[layers]), default=baseline)


def too_few(questions: int, ranges: int) -> bool:
    """Whether not even a range that is better on every question could be told from chance."""
    return _chance_of(questions, 0) * (ranges - 1) > _CHANCE


def wins_and_losses(kl: Sequence[float], baseline: Sequence[float]) -> tuple[int, int]:
    """On how many questions a range has less KL than the baseline, and on how many more."""
    pairs = list(zip(kl, baseline, strict=True))
    return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)


def render_question(engine: Engine, passages: Sequence[str], question: str) -> str:
    """A prompt that asks a question about some passages, by the model's chat template if it has one."""
    content = "\n\n".join([_INSTRUCTION, *passages, f"Question: {question}"])
    try:
        return engine.render_chat([{"role": "user", "content": content}])
    except ConfigError:  # a model that was never taught to chat
        return f"{content}\nAnswer:"


class _NotBlendedError(Exception):
    """A prompt was read otherwise than it had to be."""


def _measure(
    engine: TransformersEngine, question: ProfilingQuestion, passages: list[str], ranges: list[Layers], ratio: float
) -> list[float]:
    """KL of full reuse, and of each range of layers."""
    engine.warm(passages)
    if not all(engine.is_warm(passages)):
        raise _NotBlendedError("its passages don't fit the store's memory together")
    prompt = render_question(engine, passages, question.text)
    own = engine.generate(prompt, max_tokens=MAX_ANSWER_TOKENS, blend=_OFF).token_ids
    full = engine.score(prompt, [own, question.answer], blend=_OFF)
    expected = [logits.double().log_softmax(-1) for logits in full.logits]

    def kl(**blend: Any) -> float:
        scores = engine.score(prompt, full.token_ids, blend={"mode": "blend", "policy": "query_aware", **blend})
        stats = scores.stats
        if stats.decision != "blend" or stats.policy not in ("query_aware", "") or stats.faults:
            raise _NotBlendedError(f"it was not blended as asked ({stats.reason}; chosen by {stats.policy or 'none'})")
        return sum(map(divergence, expected, scores.logits))

    return [kl(recompute_ratio=0.0), *(kl(recompute_ratio=ratio, question_layers=layers) for layers in ranges)]


def _chance_of(wins: int, losses: int) -> float:
    """How often a fair coin would win at least so many of all that were won or lost."""
    decided = wins + losses
    return sum(math.comb(decided, n) for n in range(wins, decided + 1)) / (1 << decided)
