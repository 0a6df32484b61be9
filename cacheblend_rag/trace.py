"""What a blend measured and what it chose, for people who look into one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """One figure of some tokens of a prompt.

    Attributes:
        positions: int64 ``[tokens]``, ascending.
        values: float32 ``[tokens]``.
    """

    positions: NDArray[np.int64]
    values: NDArray[np.float32]

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The values of those of some positions that were measured."""
        return self.values[np.isin(self.positions, positions)]


@dataclasses.dataclass(frozen=True, eq=False)
class BlendTrace:
    """What one blend measured, and what it chose.

    Attributes:
        recomputed: int64, ascending: the matched positions that were recomputed, forced ones among them.
        deviations: By layer: squared L2 distances between fresh and cached values (with ``hkvd_kv`` keys count too) of
            matched tokens, as the check layers of a policy measured them. Empty if the policy measures none, or if the
            choice was known from an earlier blend of the same prompt.
        read: What each token gives to the question's attention, see
            :class:`~cacheblend_rag.passes.QuestionAttention`; None if the policy doesn't ask.
    """

    recomputed: NDArray[np.int64]
    deviations: Mapping[int, Measured]
    read: Measured | None

    @property
    def score_range(self) -> tuple[float, ...]:
        """What the policy sorted by, the lowest and the highest of the recomputed tokens.

        Empty if nothing was measured, and where it sorted by a product of both, as ``hybrid`` does.
        """
        last = self.read
        if self.deviations:
            last = self.deviations[max(self.deviations)] if last is None else None
        scores = np.empty(0) if last is None else last.at(self.recomputed)
        return (float(scores.min()), float(scores.max())) if len(scores) else ()

    @property
    def deviation(self) -> dict[str, float]:
        """``"mean"`` and ``"p95"`` of the deviations, where they were measured first: of all matched tokens.

        At later check layers only those are left that deviate most. Empty if nothing was measured that is finite.
        """
        if not self.deviations:
            return {}
        values = self.deviations[min(self.deviations)].values
        finite = values[np.isfinite(values)].astype(np.float64)
        return {"mean": float(finite.mean()), "p95": float(np.percentile(finite, 95))} if len(finite) else {}

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""

        def plain(measured: Measured) -> dict[str, Any]:
            values = [value if math.isfinite(value) else None for value in measured.values.tolist()]  # as JSON has it
            return {"positions": measured.positions.tolist(), "values": values}

        return {
            "recomputed": self.recomputed.tolist(),
            "deviations": {str(layer): plain(measured) for layer, measured in self.deviations.items()},
            "read": None if self.read is None else plain(self.read),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> BlendTrace:
        """The inverse of :meth:`to_dict`; what was not finite is NaN."""

        def measured(values: Mapping[str, Any]) -> Measured:
            return Measured(np.array(values["positions"], np.int64), np.array(values["values"], np.float32))

        return cls(
            np.array(plain["recomputed"], np.int64),
            {int(layer): measured(values) for layer, values in plain["deviations"].items()},
            None if plain["read"] is None else measured(plain["read"]),
        )
