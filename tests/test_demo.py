"""The demo, as a user would run it, on the models that `make demo` fetches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_demo(models: Path, work: Path, *options: str) -> str:
    command = [sys.executable, "examples/demo.py", "--models", str(models), "--work", str(work), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def models(smollm2: str) -> Path:
    models = Path(smollm2).parent
    if not (models / "all-minilm-l6-v2").is_dir():
        pytest.skip("no embedding model beside CACHEBLEND_TEST_MODEL: run `make test`")
    return models


@pytest.mark.timeout(1200)  # a CPU without wide vectors takes minutes
def test_demo_twice(models: Path, tmp_path: Path) -> None:
    first = run_demo(models, tmp_path / "work", "--questions", "2")
    for shown in ("of 72 documents indexed and warm", "full prefill", "blend", "chunks from:", "times sooner", "gold:"):
        assert shown in first
    assert (tmp_path / "work" / "ttft.png").stat().st_size > 10_000
    second = run_demo(models, tmp_path / "work", "--questions", "1")
    assert "warmed now: 0" in second


@pytest.mark.slow
def test_demo_on_vllm(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed: run `make vllm`")
    shown = run_demo(models, tmp_path / "work", "--engine", "vllm", "--questions", "1")
    for part in ("of 72 documents indexed and warm", "full prefill", "blend", "times sooner"):
        assert part in shown
