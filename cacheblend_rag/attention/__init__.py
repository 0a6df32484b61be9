"""Attention for rows at any positions: a query at position p sees keys 0..p and no others."""

from cacheblend_rag.attention.rows import RowAttention

__all__ = ["RowAttention"]
