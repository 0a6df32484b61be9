"""Many requests in random order over a small disk store that evicts: plain answers stay right, memory stays flat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cacheblend_rag.store import open_store

from .conftest import open_engine, random_text


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize("requests", [30, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
def test_soak(make_model: Callable[..., str], store_dir: Path, requests: int) -> None:
    rng = np.random.default_rng(0)
    chunks = [random_text(seed, 300) for seed in range(40)]
    store = open_store(store_dir, max_bytes=6 << 20, memory_bytes=1 << 20)  # about half of the chunks
    with open_engine(make_model("qwen3"), store=store) as engine:
        plain: dict[tuple[int, ...], list[int]] = {}
        decisions: set[str] = set()
        sizes: list[int] = []
        for number in range(requests):
            order = tuple(int(n) for n in rng.permutation(len(chunks))[:5])
            if number % 3 == 0:
                engine.warm([chunks[n] for n in order])
            prompt = "\n\n".join(chunks[n] for n in order) + f"\n\nQuestion {number % 7}, what was in there?"
            blended = engine.generate(prompt, max_tokens=4)
            decisions.add(blended.stats.decision)
            full = engine.generate(prompt, max_tokens=4, blend={"mode": "off"})
            exact = engine.generate(prompt, max_tokens=4, blend={"recompute_ratio": 1.0})
            assert exact.token_ids == full.token_ids
            assert plain.setdefault((*order, number % 7), full.token_ids) == full.token_ids
            sizes.append(resident_bytes())
        assert decisions == {"blend", "prefill"} or decisions == {"blend"}
        assert sum(entry.nbytes for entry in store.entries()) <= 6 << 20
        assert np.mean(sizes[-requests // 6 :]) < np.mean(sizes[requests // 3 : requests // 2]) + (20 << 20)
