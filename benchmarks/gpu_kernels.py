"""The attention of scattered rows, on its own: our kernels against FlashAttention 3 on all rows.

    python benchmarks/gpu_kernels.py [--json FILE]

Needs a CUDA GPU and vLLM. Llama-3-8B's shape, one layer, paged KV with blocks of 16 in random order, rows at random
positions (the worst case). Each is timed with events, interleaved, medians. The rate counts the pairs of a row and a
key that it sees: 4 * head_dim operations a head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import write_json
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from cacheblend_rag.attention.paged import PagedRows, attend_rows, tile_rows
from cacheblend_rag.attention.prefix import BUCKET, Buckets, attend_buckets

HEADS, KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call on the GPU, caches cold."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def measure(tokens: int, ratio: float, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table for one length and share of rows."""
    generator = torch.Generator().manual_seed(0)
    blocks = tokens // PAGE
    cache = torch.randn(blocks + 1, PAGE, KV_HEADS, 2 * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    keys, values = cache.split(HEAD_DIM, dim=-1)
    table = (torch.randperm(blocks, generator=generator) + 1).int().cuda()[None]
    count = int(tokens * ratio) // BUCKET * BUCKET
    positions = torch.randperm(tokens, generator=generator)[:count].sort().values
    tile = tile_rows(HEADS, KV_HEADS)
    rows = PagedRows(positions.int().cuda(), torch.zeros(count // tile, dtype=torch.int32, device="cuda"), table)
    query = torch.randn(tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    some = query[positions.cuda()].contiguous()
    scale = HEAD_DIM**-0.5
    version = get_flash_attn_version()
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    length = torch.tensor([tokens], dtype=torch.int32, device="cuda")

    def full() -> torch.Tensor:
        return flash_attn_varlen_func(
            q=query, k=keys, v=values, cu_seqlens_q=bounds, max_seqlen_q=tokens, seqused_k=length, max_seqlen_k=tokens,
            softmax_scale=scale, causal=True, block_table=table, fa_version=version,
        )  # fmt: skip

    calls: dict[str, Callable[[], Any]] = {f"FlashAttention {version}, all rows": full}
    calls["rows, one kernel"] = lambda: attend_rows(some, keys, values, rows, scale)
    if version == 3:
        buckets = Buckets.of(rows)
        calls["rows, FlashAttention 3 before the diagonal"] = lambda: attend_buckets(
            flash_attn_varlen_func, some, keys, values, buckets, scale
        )
    exact = full()[positions.cuda()].float()
    pairs = {name: float((positions + 1).sum()) for name in calls}
    pairs[f"FlashAttention {version}, all rows"] = tokens * (tokens + 1) / 2
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            milliseconds = timed(call)
            if turn >= 3:
                times[name].append(milliseconds)
    table_rows = []
    for name, measured in times.items():
        median = statistics.median(measured)
        rate = pairs[name] * 4 * HEAD_DIM * HEADS / median / 1e9
        error = 0.0 if "all rows" in name else float((calls[name]().float() - exact).norm() / exact.norm())
        row = {"tokens": tokens, "ratio": ratio, "kernel": name, "ms": median, "tflops": rate, "relative_error": error}
        table_rows.append(row)
        print(
            f"{tokens:6d} {ratio:5.2f} {name:45s} {median:8.3f} ms {rate:6.0f} TFLOP/s, error {error:.1e}", flush=True
        )
    return table_rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15, 0.30])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for n in options.lengths for ratio in options.ratios for row in measure(n, ratio, options.rounds)]
    if options.json:
        settings = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": PAGE, "dtype": "bfloat16"}
        write_json(options.json, {"settings": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
