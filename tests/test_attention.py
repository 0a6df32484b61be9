"""Row attention against a plain softmax in float64, on random rows, windows and head groups."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.attention.rows import BLOCK_ROWS, RowAttention, attend_and_watch, watch


def naive(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and attention probabilities, one number after the other as the definition says."""
    group = query.shape[1] // key.shape[1]
    key, value = (x[0].double().repeat_interleave(group, 0) for x in (key, value))
    logits = query[0].double() @ key.transpose(1, 2) * scale
    tokens = torch.arange(key.shape[1])
    seen = tokens <= positions[:, None]
    if window is not None:
        seen &= tokens > positions[:, None] - window
    probabilities = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (probabilities @ value)[None], probabilities


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 2 * BLOCK_ROWS + 5),
    gap=st.integers(0, 300),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (9, 3)]),
    window=st.none() | st.integers(1, 400),
)
def test_rows_attend_by_position(seed: int, rows: int, gap: int, heads: tuple[int, int], window: int | None) -> None:
    torch.manual_seed(seed)
    positions = torch.randperm(rows + gap)[:rows].sort().values
    tokens = int(positions[-1]) + 1
    query = torch.randn(1, heads[0], rows, 8)
    # As the engine's buffer holds them: token by token.
    key, value = (torch.randn(tokens, heads[1], 8).transpose(0, 1)[None] for _ in range(2))
    expected, probabilities = naive(query, key, value, positions, 0.3, window)
    got = RowAttention(positions, torch.float32, window)(query, key, value, 0.3)
    assert float((got - expected).abs().max()) < 1e-5
    if window is None:
        weights = torch.rand(rows)
        out, given = attend_and_watch(query, key, value, positions, weights, 0.3)
        assert float((out - expected).abs().max()) < 1e-5
        norms = value[0].norm(dim=-1).repeat_interleave(heads[0] // heads[1], dim=0)
        in_full = (probabilities * weights[:, None] * norms[:, None]).mean(dim=0).sum(dim=0)
        assert float((given - in_full).abs().max()) < 1e-5 * float(in_full.max())
        assert torch.equal(watch(query, key, value, positions, weights, 0.3), given)
