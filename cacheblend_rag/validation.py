"""What counts as a number in a setting: ``True`` does not, though Python has it for an integer."""

from __future__ import annotations

import math
from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is an integer or a finite float."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))
