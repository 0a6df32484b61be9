"""How well an answer agrees with gold answers: exact match, F1 and ROUGE-L, the best over the gold answers.

Exact match and F1 are those of SQuAD and HotpotQA: texts are compared without case, punctuation and articles.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

METRICS = ("em", "f1", "rouge_l")

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_metrics(answer: str, gold: Sequence[str]) -> dict[str, float]:
    """Each of :data:`METRICS`, in [0, 1], over at least one gold answer."""
    measures: tuple[Callable[[str, str], float], ...] = (exact_match, f1, rouge_l)
    return {name: max(measure(answer, one) for one in gold) for name, measure in zip(METRICS, measures, strict=True)}


def exact_match(answer: str, gold: str) -> float:
    """1 if they are the same but for case, punctuation and articles."""
    return float(_words(answer) == _words(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of words. A "yes", "no" or "noanswer" agrees with nothing but itself."""
    said, wanted = _words(answer), _words(gold)
    if said != wanted and any(words in (["yes"], ["no"], ["noanswer"]) for words in (said, wanted)):
        return 0.0
    common = sum((Counter(said) & Counter(wanted)).values())
    return _harmonic_mean(common, len(said), len(wanted))


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words: lower-case runs of ASCII letters and digits."""
    said, wanted = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, gold))
    return _harmonic_mean(_common_subsequence(said, wanted), len(said), len(wanted))


def _words(text: str) -> list[str]:
    text = text.lower().translate(_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)  # against each beginning of the second
    for word in first:
        diagonal = 0
        for n, other in enumerate(second, start=1):
            longer = diagonal + 1 if word == other else max(lengths[n], lengths[n - 1])
            diagonal, lengths[n] = lengths[n], longer
    return lengths[-1]


def _harmonic_mean(common: int, said: int, wanted: int) -> float:
    """F-measure of what is common to two texts of some lengths; 1 if both are empty."""
    if not said and not wanted:
        return 1.0
    return 2 * common / (said + wanted)
