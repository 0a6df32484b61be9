"""400 requests with passages in random order: memory stays flat over the last 200, and every plain answer is plain vLLM's.

The first 200 fill what is bounded: vLLM's and our own caches, the allocator's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from .conftest import CHUNKS, Engines, connectors, forget_prefixes, scheduler

REQUESTS = 400
BATCHES = 16
ENGINE_ARGS: dict[str, Any] = {"block_size": 32, "max_model_len": 2048, "num_gpu_blocks_override": 400}

# Stock vLLM, without a connector, in a process of its own.
PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts, arguments = json.load(sys.stdin)
llm = LLM(model, dtype="float32", enforce_eager=True, **arguments)
answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(temperature=0, max_tokens=6))
print("ANSWERS" + json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


def stock_answers(model: str, prompts: list[list[int]]) -> list[list[int]]:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=json.dumps([model, prompts, ENGINE_ARGS]),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-2000:]
    answers: list[list[int]] = json.loads(lines[0].removeprefix("ANSWERS"))
    return answers


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not in use
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


@pytest.mark.timeout(600)
def test_soak(engines: Engines, model: str) -> None:
    rng = random.Random(0)
    texts = []
    for n in range(24):
        passages = "\n".join(CHUNKS[k] for k in rng.sample(range(6), rng.randint(1, 5)))
        texts.append(f"Read.\n{passages}\nQuestion {n}?")
    engines.close()
    engine = engines.get(model, engine_args=ENGINE_ARGS)
    expected = stock_answers(model, [engine._prompt_ids(text) for text in texts])
    engine.warm(CHUNKS)

    def ask(request: tuple[int, str, float]) -> tuple[int, str, list[int]]:
        n, mode, ratio = request
        blend = {"mode": mode, "recompute_ratio": ratio, "policy": "hkvd" if ratio == 0.1 else "query_aware"}
        return n, mode, engine.generate(texts[n], max_tokens=6, blend=blend).token_ids

    sizes = []
    plain = blended = 0
    with ThreadPoolExecutor(4) as pool:
        for batch in range(BATCHES):
            requests = [
                (rng.randrange(24), rng.choice(["blend", "off"]), rng.choice([0.0, 0.1, 0.3]))
                for _ in range(REQUESTS // BATCHES)
            ]
            for n, mode, token_ids in pool.map(ask, requests):
                if mode == "off":
                    assert token_ids == expected[n], f"batch {batch}, prompt {n}"
                    plain += 1
                else:
                    blended += 1
            sizes.append(resident_bytes())
    assert plain > 120 and blended > 120
    assert not connectors(engine)[0].faults
    assert engine.counts["blend"] > 20
    half = connectors(engine)[0]._scheduler
    assert not half._plans and not half._box
    assert scheduler(engine).kv_cache_manager.block_pool.get_num_free_blocks() == 399
    # One prompt's KV that is kept for each blended request would be 100 MiB.
    assert sizes[-1] - sizes[BATCHES // 2 - 1] < 24 << 20, sizes
    forget_prefixes(engine)
