"""Listens to the passes of a blend, so that it can be told what they found."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np
import torch

from cacheblend_rag.passes import Deviations, Pass, QuestionAttention
from cacheblend_rag.trace import BlendTrace, Measured

if TYPE_CHECKING:
    from cacheblend_rag.blending import BlendResult
    from cacheblend_rag.layout import PromptLayout


class Recorder:
    """Of one blend. What it keeps stays on the engine's device until :meth:`trace`, which waits for it."""

    def __init__(self) -> None:
        self._found: list[tuple[Pass, torch.Tensor]] = []

    def listen(self, passes: Generator[Pass, torch.Tensor, BlendResult]) -> Generator[Pass, torch.Tensor, BlendResult]:
        """The same passes; what is sent back to them is kept."""
        wanted = next(passes)
        while True:
            found = yield wanted
            self._found.append((wanted, found))
            try:
                wanted = passes.send(found)
            except StopIteration as end:
                result: BlendResult = end.value
                return result

    def trace(self, layout: PromptLayout, recomputed: torch.Tensor) -> BlendTrace:
        """What was found, and the positions that were chosen (int64, ascending)."""
        matched = layout.matched.numpy()
        deviations: dict[int, Measured] = {}
        read = None
        for wanted, found in self._found:
            if isinstance(wanted, Deviations):
                rows = wanted.rows.cpu().numpy()
                is_cached = np.isin(rows, matched)  # others have nothing to deviate from
                deviations[wanted.layer] = Measured(rows[is_cached], found.float().cpu().numpy()[is_cached])
            elif isinstance(wanted, QuestionAttention):
                values = found.float().cpu().numpy()
                read = Measured(np.arange(len(values)), values)
        return BlendTrace(recomputed.cpu().numpy(), deviations, read)
