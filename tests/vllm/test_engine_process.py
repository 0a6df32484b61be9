"""The in-process engine as users get it: vLLM's core in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .conftest import WIDE

# A long prompt is read in many steps without an output. What is asked meanwhile must not wait for its first token.
SCRIPT = """
import sys, threading, time
from cacheblend_rag import load_engine

if __name__ == "__main__":
    args = {"enforce_eager": True, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 16}
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


def test_a_request_does_not_wait_for_the_first_token_of_another(make_model: Callable[..., str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(
        [sys.executable, str(script), make_model("qwen2", **WIDE)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "ENDED short long" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]
