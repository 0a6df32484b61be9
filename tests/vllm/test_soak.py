"""Requests with passages in random order, several at a time: plain answers stay right, and nothing is left behind."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cacheblend_rag.engines.vllm import VllmEngine

from .conftest import CHUNKS, Engines, connectors, forget_prefixes, scheduler

BATCHES = 8
BLOCKS = 400
ENGINE_ARGS: dict[str, Any] = {"block_size": 32, "max_model_len": 2048, "num_gpu_blocks_override": BLOCKS}


def prompts(count: int) -> list[str]:
    rng = random.Random(0)
    passages = ("\n".join(CHUNKS[k] for k in rng.sample(range(6), rng.randint(1, 5))) for _ in range(count))
    return [f"Read.\n{text}\nQuestion {n}?" for n, text in enumerate(passages)]


def soak(engine: VllmEngine, texts: list[str], requests: int, used_bytes: Callable[[], int]) -> dict[str, Any]:
    """What these requests do, four at a time, half of them plain."""
    rng = random.Random(1)
    plain: list[tuple[int, list[int], Any]] = []

    def ask(n: int, mode: str, ratio: float) -> None:
        blend = {"mode": mode, "recompute_ratio": ratio, "policy": "hkvd" if ratio == 0.1 else "query_aware"}
        answer = engine.generate(texts[n], max_tokens=6, logprobs=3, blend=blend)
        if mode == "off":
            plain.append((n, answer.token_ids, answer.logprobs))

    sizes = []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(BATCHES):
            numbers = [rng.randrange(len(texts)) for _ in range(requests // BATCHES)]
            modes = [rng.choice(["blend", "off"]) for _ in numbers]
            ratios = [rng.choice([0.0, 0.1, 0.3]) for _ in numbers]
            list(pool.map(ask, numbers, modes, ratios))
            sizes.append(used_bytes())
    half = connectors(engine)[0]._scheduler
    return {
        "plain": plain,
        "sizes": sizes,
        "counts": dict(engine.counts),
        "faults": sum(connector.faults.total() for connector in connectors(engine)),
        "left": len(half._plans) + len(half._box.reports),
        "free_blocks": scheduler(engine).kv_cache_manager.block_pool.get_num_free_blocks(),
    }


def assert_clean(result: dict[str, Any], expected: list[Any]) -> None:
    """Every plain answer is the expected one (token ids, log-probabilities), and no request left anything."""
    for n, token_ids, logprobs in result["plain"]:
        assert token_ids == expected[n][0]
        for mine, theirs in zip(logprobs, expected[n][1], strict=True):
            assert all(abs(mine[token] - theirs[token]) < 1e-4 for token in mine.keys() & theirs.keys())
    assert (result["faults"], result["left"], result["free_blocks"]) == (0, 0, BLOCKS - 1)


# In this process, and few


def tensor_bytes() -> int:
    """Memory of all tensors there are."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) in kinds and not found.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_few(engines: Engines, model: str) -> None:
    engine = engines.get(model, engine_args=ENGINE_ARGS)
    engine.warm(CHUNKS)
    texts = prompts(12)
    before = [engine.generate(text, max_tokens=6, logprobs=3, blend={"mode": "off"}) for text in texts]
    forget_prefixes(engine)
    result = soak(engine, texts, 64, tensor_bytes)
    assert len(result["plain"]) > 20
    assert result["counts"]["blend"] > 10
    assert_clean(result, [(answer.token_ids, answer.logprobs) for answer in before])
    # One prompt's KV that is kept for each blended request would be several MiB.
    assert result["sizes"][-1] - result["sizes"][1] < 1 << 20, result["sizes"]


# In processes of their own, and many


def stock_answers(model: str) -> list[Any]:
    """Answers of vLLM without a connector."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", enforce_eager=True, **ENGINE_ARGS)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3)
    outputs = [answer.outputs[0] for answer in llm.generate(prompts(24), params, use_tqdm=False)]
    return [
        [list(output.token_ids), [{token: one.logprob for token, one in step.items()} for step in output.logprobs]]
        for output in outputs
    ]


def long_soak(model: str) -> dict[str, Any]:
    engines = Engines()
    engine = engines.get(model, engine_args=ENGINE_ARGS)
    engine.warm(CHUNKS)
    result = soak(engine, prompts(24), 200, resident_bytes)
    engines.close()
    return result


def resident_bytes() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not in use
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def in_a_process(function: str, model: str) -> Any:
    """Call one of the functions above in a new process."""
    code = (
        "import json, sys\nfrom tests.vllm import test_soak\n"
        f"print('RESULT' + json.dumps(test_soak.{function}(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model],
        cwd=Path(__file__).parents[2],
        # oneDNN keeps the code of a thousand matrix products of different shapes, which is not what is measured here.
        env={**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_many(model: str) -> None:
    with ThreadPoolExecutor() as pool:
        stock, blending = (pool.submit(in_a_process, function, model) for function in ("stock_answers", "long_soak"))
    result = blending.result()
    assert len(result["plain"]) > 60
    assert result["counts"]["blend"] > 20
    assert_clean(result, stock.result())
    # One prompt's KV that is kept for each blended request would be 25 MiB.
    assert result["sizes"][-1] - result["sizes"][BATCHES // 2 - 1] < 8 << 20, result["sizes"]
