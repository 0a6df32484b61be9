"""Measures by requests alone whether blending is exact where it has to be.

Log-probabilities are compared, since that is what an engine tells. Two prompts are read by full prefill and by a blend
that recomputes all that it can:

- one with some chunks in it, of which everything is recomputed: invariant I1;
- one that begins with the primer and a chunk, as that chunk was read when it was warmed. There its stored KV is what
  full prefill computes, so it is read and not recomputed, whatever the ratio is: invariant I2. What follows is computed
  from it.

What counts as rounding is what full prefill shows against itself, when it reads a prompt in other pieces, or beside
another prompt: an engine with a prefix cache goes on from what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cacheblend_rag.diagnostics.checks import Check
from cacheblend_rag.diagnostics.comparing import first_logprobs
from cacheblend_rag.diagnostics.exactness import exactness_check, not_measured
from cacheblend_rag.divergence import TOPS
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import PromptTooLongError
from cacheblend_rag.stats import Generation

# Difference of log-probabilities that is rounding in any case: a blend's rows go through other kernels than a prefill's
# (in float32 on a GPU: in TF32). With bfloat16 it is a few times what one logit is rounded by; what is blended wrongly
# differs by 1 and more.
_ROUNDING = {"float32": 1e-3, "float16": 6e-2, "bfloat16": 5e-1}
_OFF = {"mode": "off"}
_EVERYTHING = {"mode": "blend", "recompute_ratio": 1.0}
_QUESTION = "\n\nWhat do these notes have in common, and what tells one of them from the other?\nAnswer:"


def check_exactness(engine: Engine, prompt: str, chunks: Sequence[str]) -> list[Check]:
    """Check invariants I1 and I2.

    Args:
        engine: Knows the chunks.
        prompt: Holds them.
        chunks: At least two.
    """
    ids = engine.token_ids(prompt)
    behind_primer, chunk_tokens = _behind_primer(engine, chunks)
    try:
        plain = _ask(engine, ids, _OFF)
        again = _ask(engine, ids, _OFF)
        beside, _ = engine.generate([ids, behind_primer[: len(behind_primer) // 2]], **_asked(_OFF))
        exact_plain = _ask(engine, behind_primer, _OFF)
        exact_again = _ask(engine, behind_primer, _OFF)
        everything = _ask(engine, ids, _EVERYTHING)
        exact = _ask(engine, behind_primer, _EVERYTHING)
    except PromptTooLongError as error:
        return [not_measured(f"the sample prompt does not fit the context: {error}")]
    if everything.stats.decision != "blend":
        return [not_measured(everything.stats.reason)]
    rounding = max(difference(plain, again), difference(plain, beside), difference(exact_plain, exact_again))
    most = max(_ROUNDING[engine.scope.fingerprint.dtype], 2 * rounding)
    bound = f"at most {most:.1e}: reading a prompt in other pieces changes {rounding:.1e}"
    found = difference(everything, plain)
    checks = [
        exactness_check("ratio 1 is full prefill", found <= most, f"log-probabilities differ by {found:.1e} ({bound})")
    ]
    name = "exact KV gives exact answers, behind the primer"
    computed = exact.stats.recomputed_tokens + exact.stats.missed_tokens
    if exact.stats.decision != "blend" or computed > len(behind_primer) - chunk_tokens:
        return [*checks, Check(name, True, "not measured: the chunk behind the primer was not read from the store")]
    found = difference(exact, exact_plain)
    figure = f"log-probabilities differ by {found:.1e}, {chunk_tokens} tokens read"
    return [*checks, exactness_check(name, found <= most, figure)]


def difference(one: Generation, other: Generation) -> float:
    """The largest difference of the log-probabilities of two first tokens.

    A token that only one of them knows is no more likely in the other than the least likely that this one knows.
    """
    a, b = first_logprobs(one), first_logprobs(other)
    return max(_one_way(a, b), _one_way(b, a))


def _one_way(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    least = min(b.values())
    return max(abs(value - b[token]) if token in b else max(value - least, 0.0) for token, value in a.items())


def _behind_primer(engine: Engine, chunks: Sequence[str]) -> tuple[list[int], int]:
    """A prompt of the primer, two chunks and a question, and how many tokens the first chunk has."""
    special = len(engine.token_ids(""))
    first, second, question = (engine.token_ids(text)[special:] for text in (*chunks[:2], _QUESTION))
    return [*engine.scope.primer_ids, *first, *second, *question], len(first)


def _ask(engine: Engine, ids: list[int], blend: Mapping[str, Any]) -> Generation:
    return engine.generate(ids, **_asked(blend))


def _asked(blend: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_tokens": 1, "logprobs": TOPS, "blend": blend}
