"""What an engine reports, as frameworks see it that read type hints at run time."""

from __future__ import annotations

import typing

from cacheblend_rag.stats import BlendStats, Tier


def test_type_hints_can_be_resolved() -> None:
    """``pydantic.TypeAdapter(BlendStats)`` and others need this."""
    assert typing.get_type_hints(BlendStats)["read_bytes"] == dict[Tier, int]
