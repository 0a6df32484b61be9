"""The benchmarks are scripts beside each other: they import each other by name, and so do their tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cacheblend_rag import policies

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def _forget_ideas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies that a benchmark registers are not there for other tests."""
    monkeypatch.setattr(policies, "_POLICIES", dict(policies._POLICIES))
