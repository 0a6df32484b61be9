"""The embedded engine as the doctor examines it: everything can be measured, in a store of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cacheblend_rag.diagnostics.checks import Check, check_store, describe_model
from cacheblend_rag.diagnostics.comparing import ByLogits, Comparison
from cacheblend_rag.diagnostics.exactness import check_shift, exactness_check, not_measured
from cacheblend_rag.engines.base import Engine
from cacheblend_rag.engines.transformers import TransformersEngine
from cacheblend_rag.store import MemoryStore

_LEAST_BYTES = 1 << 30
_EXACT = 1e-4  # max abs difference of logits that is rounding, in float32; otherwise twice what rounding is seen to do


class Embedded:
    """See :class:`~cacheblend_rag.diagnostics.subjects.Subject`.

    Args:
        engine: Its store is left alone.
    """

    tag = ""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        # A prompt is no longer than the context, whose chunks have to be there together.
        self._beside = engine.beside(MemoryStore(max(_LEAST_BYTES, engine.context_window * engine.token_bytes)))

    def check_model(self) -> Check:
        """See the protocol. A model that has been loaded has been probed: it can be blended."""
        device = self.engine.device
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        return Check("model", True, describe_model(self.engine, f"on {name}"))

    def check_exactness(self, prompt: str, chunks: Sequence[str]) -> list[Check]:
        """See the protocol. Chunk KV is taken from full prefill of the very prompt, which is exact."""
        found = self.engine.measure_exactness(prompt, chunks)
        if np.isnan(found.everything):
            return [not_measured("the sample prompt is longer than what this model blends")]
        most = max(_EXACT, 2 * found.rounding)
        bound = f"at most {most:.1e}: reading the prompt in two pieces changes {found.rounding:.1e}"
        figure = f"logits differ by {found.everything:.1e} ({bound})"
        checks = [exactness_check("ratio 1 is full prefill", found.everything <= most, figure)]
        for ratio, difference in found.exact_kv.items():
            name = f"exact KV gives exact answers, ratio {ratio:g}"
            checks.append(exactness_check(name, difference <= most, f"logits differ by {difference:.1e}"))
        return [*checks, check_shift(self.engine, found.shift.tolist())]

    def check_store(self, store: Path | None) -> list[Check]:
        """See the protocol."""
        return check_store(store, self.engine)

    def warm(self, chunks: Sequence[str]) -> Engine:
        """See the protocol. They are in memory, and the user's store is not touched."""
        self._beside.warm(chunks)
        return self._beside

    def comparison(self, engine: Engine) -> Comparison:
        """See the protocol."""
        assert isinstance(engine, TransformersEngine)
        return ByLogits(engine)

    def close(self) -> None:
        """See the protocol."""
        self._beside.close()
