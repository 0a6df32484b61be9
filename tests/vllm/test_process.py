"""In process as users have it, with vLLM's core in a process of its own: our engine, and ``vllm.LLM`` by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import CHUNKS, WIDE, Engines

# A long prompt is read in many steps without an output. What is asked meanwhile must not wait for its first token.
ENGINE = """
import sys, threading, time
from cacheblend_rag import load_engine

if __name__ == "__main__":
    args = {"enforce_eager": True, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 8}
    engine = load_engine(sys.argv[1], engine="vllm", dtype="float32", engine_args=args)
    ended, began = [], threading.Event()

    def read(name, prompt, tokens):
        began.set()
        engine.generate(prompt, max_tokens=tokens)
        ended.append(name)

    long = threading.Thread(target=read, args=("long", "a long prompt " * 140, 1))
    long.start()
    began.wait()
    time.sleep(0.05)  # it is being read
    read("short", "a short prompt", 2)
    long.join()
    engine.warm(["a chunk of some forty characters, more or less"])
    engine.close()
    print("ENDED", *ended)
"""

BY_HAND = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, store, chunk = sys.argv[1:]
    settings = {"store": store, "blend": {"mode": "blend"}}
    transfer = {"kv_connector": "CacheBlendConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}
    llm = LLM(model, dtype="float32", enforce_eager=True, kv_transfer_config=transfer)

    def ask(prompt, **ours):
        extra = {"kv_transfer_params": {"cacheblend": ours}} if ours else None
        params = SamplingParams(max_tokens=4, temperature=0, extra_args=extra)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        return output.outputs[0].text, output.kv_transfer_params["cacheblend"]

    prompt = "Read this. " + chunk + " What is it?"
    warmed, plain = ask(chunk, warm=True), ask(prompt, mode="off")
    print("TOLD" + json.dumps([warmed, plain, ask(prompt, recompute_ratio=1.0), ask(prompt)]))
"""


def run(folder: Path, code: str, *arguments: str) -> str:
    """Run a script in a process of its own; its output."""
    script = folder / "script.py"
    script.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def outputs(
    make_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory, engines: Engines
) -> Iterator[dict[str, Future[str]]]:
    """Of both scripts, which run side by side: mostly they wait for imports."""
    engines.close()
    folders = [tmp_path_factory.mktemp(name) for name in ("engine", "by_hand")]
    by_hand = (make_model("qwen3", **WIDE), str(folders[1] / "store"), CHUNKS[0])
    with ThreadPoolExecutor() as pool:
        yield {
            "engine": pool.submit(run, folders[0], ENGINE, make_model("qwen2", **WIDE)),
            "by hand": pool.submit(run, folders[1], BY_HAND, *by_hand),
        }


def test_a_request_does_not_wait_for_the_first_token_of_another(outputs: dict[str, Future[str]]) -> None:
    assert "ENDED short long" in outputs["engine"].result()


def test_by_hand(outputs: dict[str, Future[str]]) -> None:
    output = outputs["by hand"].result()
    line = next(line for line in output.splitlines() if line.startswith("TOLD"))
    (_, warmed), (plain, off), (exact, _), (_, blended) = json.loads(line.removeprefix("TOLD"))
    assert (warmed["stored"], off["decision"], blended["decision"], blended["segments"]) == (1, "prefill", "blend", 1)
    assert exact == plain
    assert blended["reused_tokens"] > 0.5 * len(CHUNKS[0])
