"""The Triton kernels against plain torch, in Triton's interpreter: ``make test`` sets TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cacheblend_rag.attention.rows import RowAttention

triton = pytest.importorskip("triton")

from cacheblend_rag.attention.paged import PagedRows, attend_rows, tile_rows  # noqa: E402
from cacheblend_rag.attention.prefix import BUCKET, Buckets, attend_buckets  # noqa: E402
from cacheblend_rag.attention.watching import watch_rows  # noqa: E402

SCALE = 0.3


@dataclasses.dataclass
class Pages:
    """Random sequences in a paged cache full of NaN, and random rows of each."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rows: PagedRows
    tile: int

    def sequence_of(self, row: int) -> int:
        return int(self.rows.tile_sequence[row // self.tile])

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, float32, and what each key of its sequence gives to each row, summed over a KV head's group."""
        rows, heads, head_dim = self.query.shape
        page, kv_heads = self.keys.shape[1:3]
        out = torch.empty(rows, heads, head_dim)
        capacity = self.rows.block_table.shape[1] * page
        given = torch.zeros(rows, kv_heads, capacity)
        query, table = self.query.float().cpu(), self.rows.block_table.cpu().long()
        keys, values = self.keys.float().cpu(), self.values.float().cpu()
        for row in range(rows):
            position = int(self.rows.positions[row])
            seen = torch.arange(position + 1)
            at = table[self.sequence_of(row), seen // page], seen % page
            key, value = keys[at].transpose(0, 1)[None], values[at].transpose(0, 1)[None]
            one = RowAttention(torch.tensor([position]), torch.float32)
            out[row] = one(query[row][None, :, None], key, value, SCALE)[0, :, 0]
            grouped = query[row].view(kv_heads, -1, head_dim)
            attention = (grouped @ key[0].transpose(1, 2) * SCALE).softmax(-1).sum(1)
            given[row, :, : position + 1] = attention * value[0].norm(dim=-1)
        return out, given


def make_pages(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    page: int = 16,
    sequences: int = 2,
    rows: int = 20,
    pages: int = 6,
    dtype: torch.dtype = torch.float32,
    unit: int | None = None,
    gap: tuple[int, int] = (0, 0),
    device: str = "cpu",
) -> Pages:
    """``gap``: positions between which there are no rows."""
    generator = torch.Generator().manual_seed(rows + head_dim + sequences)
    blocks = sequences * pages + 1
    packed = torch.full((blocks, page, kv_heads, 2 * head_dim), float("nan"))
    tile = tile_rows(heads, kv_heads)
    free = torch.randperm(blocks - 1, generator=generator) + 1
    table = free.view(sequences, pages)
    positions, tiles = [], []
    for sequence in range(sequences):
        tokens = int(torch.randint(page * pages // 2, page * pages, (1,), generator=generator))
        at = torch.arange(tokens)
        packed[table[sequence, at // page], at % page] = torch.randn(
            tokens, kv_heads, 2 * head_dim, generator=generator
        )
        some = torch.randperm(tokens, generator=generator)
        some = some[(some < gap[0]) | (some >= gap[1])][:rows].sort().values
        some = torch.cat([some, some[-1:].expand(-len(some) % (unit or tile))])
        positions.append(some)
        tiles += [sequence] * (len(some) // tile)
    paged = PagedRows(
        torch.cat(positions).int().to(device),
        torch.tensor(tiles, dtype=torch.int32, device=device),
        table.int().to(device),
    )
    keys, values = packed.to(device, dtype).split(head_dim, dim=-1)
    # As a model hands it over: a slice of the fused projection, whose rows are not contiguous.
    fused = torch.randn(len(paged.positions), heads + 2 * kv_heads, head_dim, generator=generator)
    return Pages(fused.to(device, dtype)[:, :heads], keys, values, paged, tile)


SHAPES: list[dict[str, Any]] = [
    {"head_dim": 64, "sequences": 1},
    {"head_dim": 80, "heads": 6, "sequences": 3},
    {"head_dim": 96, "heads": 4, "kv_heads": 4, "page": 32},
    {"head_dim": 128, "heads": 8, "kv_heads": 1, "rows": 9},
    {"head_dim": 256, "heads": 2, "kv_heads": 1, "rows": 5},
    {"head_dim": 32, "page": 64, "pages": 3},
]


interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1 before Triton is imported"
)


def check(pages: Pages, tolerance: float, **options: Any) -> None:
    expected, _ = pages.reference()
    got = attend_rows(pages.query, pages.keys, pages.values, pages.rows, SCALE, **options)
    assert float((got.float().cpu() - expected).abs().max()) < tolerance


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"head_dim {shape['head_dim']}")
def test_rows_see_what_is_up_to_them(shape: dict[str, Any], splits: int) -> None:
    check(make_pages(**shape), 1e-4, splits=splits)


@interpreted
@pytest.mark.parametrize("splits", [1, 4])
def test_watched_attention_is_that_of_the_rows(splits: int) -> None:
    pages = make_pages(sequences=2, rows=30)
    watch_and_check(pages, splits, 1e-5)


def watch_and_check(pages: Pages, splits: int, tolerance: float) -> None:
    rows, heads = pages.query.shape[:2]
    lse = torch.empty(rows, heads, device=pages.query.device)
    attend_rows(pages.query, pages.keys, pages.values, pages.rows, SCALE, splits=splits, lse=lse)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(0))
    weights[::3] = 0
    sequences, blocks = pages.rows.block_table.shape
    capacity, kv_heads = blocks * pages.keys.shape[1], pages.keys.shape[2]
    given = torch.ones(sequences, kv_heads, capacity, device=pages.query.device)
    watch_rows(
        pages.query, pages.keys, pages.values, pages.rows, lse, weights.to(given.device), SCALE, given, value_scale=0.5
    )
    _, each = pages.reference()
    expected = torch.ones(sequences, kv_heads, capacity)
    for row in range(rows):
        expected[pages.sequence_of(row)] += 0.5 * weights[row] * each[row]
    assert float(((given.cpu() - expected).abs() / expected).max()) < tolerance


def stand_in(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashAttention gives, in torch: each sequence of the bounds over its first ``seqused_k`` keys, unmasked."""
    query, keys, values = arguments["q"].float(), arguments["k"].float(), arguments["v"].float()
    out = torch.empty(query.shape)
    lse = torch.empty(query.shape[1], query.shape[0])
    group = query.shape[1] // keys.shape[2]
    for number, (first, last) in enumerate(
        zip(arguments["cu_seqlens_q"][:-1], arguments["cu_seqlens_q"][1:], strict=True)
    ):
        seen = torch.arange(int(arguments["seqused_k"][number]))
        at = arguments["block_table"][number, seen // keys.shape[1]].long(), seen % keys.shape[1]
        key, value = (x[at].repeat_interleave(group, dim=1) for x in (keys, values))
        logits = torch.einsum("rhd,khd->hrk", query[first:last], key) * arguments["softmax_scale"]
        lse[:, first:last] = logits.logsumexp(-1)
        out[first:last] = torch.einsum("hrk,khd->rhd", logits.softmax(-1), value)
    return out.to(arguments["q"].dtype), lse


@interpreted
@pytest.mark.parametrize(("pages_each", "gap"), [(12, (0, 0)), (150, (60, 1180))], ids=["close", "far apart"])
def test_going_on_from_a_shared_prefix(pages_each: int, gap: tuple[int, int]) -> None:
    pages = make_pages(sequences=2, rows=150, pages=pages_each, unit=BUCKET, gap=gap)
    buckets = Buckets.of(pages.rows)
    assert (int(buckets.long_tiles.max()) >= 0) == (gap[1] > 0)
    expected, _ = pages.reference()
    got = attend_buckets(stand_in, pages.query, pages.keys, pages.values, buckets, SCALE)
    assert float((got - expected).abs().max()) < 1e-4
