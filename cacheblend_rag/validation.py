"""What counts as a number, or a range of layers, in a setting: ``True`` is no number, though Python has it for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an integer or a finite float."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_layer_range(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a value is a first layer and an end behind it, as a tuple or (from JSON) a list."""
    return (
        isinstance(value, tuple | list) and len(value) == 2 and all(map(is_whole, value)) and 0 <= value[0] < value[1]
    )
