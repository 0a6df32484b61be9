"""What all engines have in common where the doctor checks that blending is exact: the lines of its table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cacheblend_rag.diagnostics.checks import Check
from cacheblend_rag.engines.base import Engine

# Of the largest key: below is rounding, a wrong rotation gives errors near 1.
_SHIFT_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def exactness_check(name: str, ok: bool, figure: str) -> Check:
    """A check that fails only where something is wrong with this package."""
    return Check(name, ok, figure, "" if ok else "this model is not blended exactly: please report it, with this table")


def not_measured(why: str) -> Check:
    """What there is to say where no prompt could be blended."""
    return Check("blending is exact", True, f"not measured: {why}")


def check_shift(engine: Engine, errors: Sequence[float], *, times: float = 1.0) -> Check:
    """Whether keys that are moved to other positions are those computed there.

    Args:
        engine: Its dtype says what is rounding.
        errors: By layer, as a share of the layer's largest key.
        times: How many times what one layer rounds by is allowed, where errors of the layers before add up.
    """
    tolerance = times * _SHIFT_TOLERANCE[engine.scope.fingerprint.dtype]
    worst = int(np.argmax(errors))
    figure = f"error {errors[worst]:.1e} of the largest key at most, in layer {worst} (rounding: {tolerance:.0e})"
    return exactness_check("keys can be shifted, in every layer", bool(errors[worst] <= tolerance), figure)
