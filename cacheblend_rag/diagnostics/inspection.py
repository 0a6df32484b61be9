"""One prompt looked into: which of its tokens were recomputed, and which should have been by their deviation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cacheblend_rag.errors import CacheBlendError

if TYPE_CHECKING:
    from cacheblend_rag.engines.transformers import TransformersEngine
    from cacheblend_rag.stats import Generation


SILENT = 1e-6
"""Of the largest mean distance of a layer: a layer with no more deviates by rounding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """What is drawn.

    Attributes:
        model: What the user called the model.
        answer: With its trace.
        pieces: The text of each token of the prompt.
        positions: int64 ``[matched]``, ascending: tokens whose KV is known.
        deviations: float32 ``[layers, matched]``: squared L2 distances between the values of full prefill and the known
            ones.
        is_recomputed: bool ``[matched]``.
        read: float32 ``[matched]``: what each gives to the question's attention; None if the policy doesn't ask.
    """

    model: str
    answer: Generation
    pieces: list[str]
    positions: NDArray[np.int64]
    deviations: NDArray[np.float32]
    is_recomputed: NDArray[np.bool_]
    read: NDArray[np.float32] | None

    @property
    def relative(self) -> NDArray[np.float64]:
        """``[matched]``: each token's distance in units of the mean token's, mean over the layers.

        Layers count alike: distances grow from layer to layer as values do. The first has none, since nothing came
        before it.
        """
        distances = np.sqrt(self.deviations.astype(np.float64))
        means = distances.mean(axis=1, keepdims=True)
        counted = means[:, 0] > SILENT * means.max(initial=0)
        if not counted.any():
            return np.zeros(distances.shape[1])
        result: NDArray[np.float64] = (distances[counted] / means[counted]).mean(axis=0)
        return result

    @property
    def held(self) -> tuple[float, float]:
        """Share of the sum of :attr:`relative` that the recomputed tokens have, and the most that as many can have."""
        relative = self.relative
        total = float(relative.sum())
        if not total:
            return 0.0, 0.0
        most = np.sort(relative)[::-1][: int(self.is_recomputed.sum())].sum()
        return float(relative[self.is_recomputed].sum()) / total, float(most) / total


def inspect_prompt(engine: TransformersEngine, prompt: str, *, max_tokens: int) -> Inspection:
    """Answer a prompt by blending, and read it by full prefill too.

    Raises:
        CacheBlendError: no known chunk is in the prompt, or it was not blended.
        PromptTooLongError: prompt plus ``max_tokens`` does not fit the context.
    """
    answer = engine.generate(prompt, max_tokens=max_tokens, blend={"mode": "blend"}, trace=True)
    trace = answer.trace
    if trace is None:
        raise CacheBlendError(f"nothing of this prompt was blended ({answer.stats.reason}): warm its passages first")
    found = engine.deviations(prompt)
    read = None if trace.read is None else trace.read.at(found.positions)
    return Inspection(
        model=engine.model_name,
        answer=answer,
        pieces=engine.pieces(prompt),
        positions=found.positions,
        deviations=found.values,
        is_recomputed=np.isin(found.positions, trace.recomputed),
        read=read,
    )
