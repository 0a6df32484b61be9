"""Warming texts of which some may be too long."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from cacheblend_rag.engines.base import Engine
from cacheblend_rag.errors import ChunkTooLongError
from cacheblend_rag.stats import WarmReport


def warm_what_fits(engine: Engine, texts: Sequence[str]) -> tuple[WarmReport, list[str]]:
    """Warm texts, but for those that do not fit the model's context; returns what was done, and those left out.

    ``engine.warm`` refuses all of them for one that is too long: that one is found by halving.

    Raises:
        StoreError: the chunk store can't be written; chunks stored before stay.
    """
    try:
        return engine.warm(texts), []
    except ChunkTooLongError:
        if len(texts) == 1:
            return WarmReport(0, 0, 0, 0, 0.0), list(texts)
    half = len(texts) // 2
    first, long_first = warm_what_fits(engine, texts[:half])
    second, long_second = warm_what_fits(engine, texts[half:])
    sums = map(sum, zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True))
    return WarmReport(*sums), long_first + long_second
