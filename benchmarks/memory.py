"""Memory of warming and answering, against what it should be: one copy of the weights, and the KV of one prompt.

    python benchmarks/memory.py --model DIR-OR-HUB-ID [--json FILE]

Reads the process's own resident set. Chunk KV goes to disk, there is no memory tier. Plain prefill of the same prompt
comes first: its activations are the yardstick for those of warming and blending.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import corpus_prompts, write_json

from cacheblend_rag import load_engine
from cacheblend_rag.store import open_store


def resident() -> int:
    """Bytes of memory this process has resident, pages of files not counted."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("needs Linux: /proc/self/status has no RssAnon")


def peak_during(work: Callable[[], Any]) -> int:
    """Most memory resident while working, looked at every millisecond."""
    peak, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=4000, help="least tokens of passages in the prompt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = open_store(directory, memory_bytes=0)
        with load_engine(options.model, store=store, dtype=options.dtype, device="cpu") as engine:
            model = engine._loaded.model  # type: ignore[attr-defined]
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            documents, (prompt,) = corpus_prompts(
                engine.render_chat, engine.count_tokens, prompts=1, tokens=options.tokens, seed=0
            )
            engine.generate("warm-up", max_tokens=1)
            rows = {"after loading": resident()}
            rows["plain prefill, peak"] = peak_during(
                lambda: engine.generate(prompt, max_tokens=1, blend={"mode": "off"})
            )
            rows["warming, peak"] = peak_during(lambda: engine.warm(documents))
            rows["after warming"] = resident()
            rows["blend 15 %, peak"] = peak_during(lambda: engine.generate(prompt, max_tokens=1))
            rows["after blending"] = resident()
            layers, kv_heads, head_dim = engine._loaded.kv_shape  # type: ignore[attr-defined]
            tokens = engine.generate(prompt, max_tokens=1).stats.prompt_tokens
            kv = tokens * layers * 2 * kv_heads * head_dim * model.dtype.itemsize
    print(f"{'weights':24} {weights / 2**20:8.1f} MiB")
    print(f"{f'KV of {tokens} tokens':24} {kv / 2**20:8.1f} MiB")
    for name, size in rows.items():
        print(f"{name:24} {size / 2**20:8.1f} MiB")
    if options.json:
        settings = {"model": Path(options.model).name, "dtype": options.dtype, "prompt_tokens": tokens}
        sizes = {"weights_bytes": weights, "kv_bytes": kv, "resident_bytes": rows}
        write_json(options.json, {"settings": settings, **sizes})
    return 0


if __name__ == "__main__":
    sys.exit(main())
