"""What the metrics of observers and of vLLM's servers have in common: labels' values, and the buckets of histograms."""

from __future__ import annotations

SOURCES = ("prefix", "reused", "recomputed", "missed")
"""Where a prompt token's KV came from: fields of ``BlendStats``, without ``_tokens``."""

DEVIATIONS = {"mean": "Mean", "p95": "95th percentile"}
"""Keys of ``BlendStats.deviation``, in words."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Buckets of times."""

SQUARED_DISTANCES = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10000.0)
"""Buckets of deviations."""
