"""Starts vLLM servers in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COMMON = ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1"]
SERVE = [sys.executable, "-m", "cacheblend_rag.cli", "serve"]
BARE = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def transfer_config(**extra: Any) -> list[str]:
    """The option that gives a bare server the connector."""
    config = {"kv_connector": "CacheBlendConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return ["--kv-transfer-config", json.dumps(config)]


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path, seconds: float = 280) -> Iterator[str]:
    """A server until the end of the block; gives its base URL."""
    port = free_port()
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # servers run in several processes
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *COMMON, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_until_up(process, port, log, seconds)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200:
                return
        time.sleep(0.3)
    raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
