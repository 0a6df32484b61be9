"""The demo, as a user would run it: on a few documents, and on the models that `make demo` fetches, in float32."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_demo(examples: Path, models: Path, work: Path, *options: str) -> str:
    command = [sys.executable, str(examples / "demo.py"), "--models", str(models), "--work", str(work), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def few_documents(tmp_path: Path) -> Path:
    """The examples with four documents, and the questions that they answer."""
    copy = tmp_path / "examples"
    (copy / "corpus" / "docs").mkdir(parents=True)
    for script in EXAMPLES.glob("*.py"):
        shutil.copy(script, copy)
    lines = (EXAMPLES / "corpus" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    single = [line for line in lines if json.loads(line)["kind"] == "single"]
    documents = list(dict.fromkeys(json.loads(line)["documents"][0] for line in single))[:4]
    for document in documents:
        shutil.copy(EXAMPLES / "corpus" / document, copy / "corpus" / document)
    kept = [line for line in single if json.loads(line)["documents"][0] in documents]
    (copy / "corpus" / "questions.jsonl").write_text("\n".join(kept), encoding="utf-8")
    return copy


@pytest.mark.timeout(1200)  # a CPU without wide vectors takes minutes
def test_demo_twice(few_documents: Path, example_models: Path, tmp_path: Path) -> None:
    options = ["--passages", "3", "--questions", "1"]
    first = run_demo(few_documents, example_models, tmp_path / "work", *options)
    for shown in ("of 4 documents indexed and warm", "full prefill", "blend", "chunks from:", "times sooner", "gold:"):
        assert shown in first
    assert (tmp_path / "work" / "ttft.png").stat().st_size > 10_000
    second = run_demo(few_documents, example_models, tmp_path / "work", *options)
    assert "warmed now: 0" in second


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_demo_on_the_whole_corpus(fetched_models: Path, tmp_path: Path, engine: str) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed: run `make vllm`")
    shown = run_demo(EXAMPLES, fetched_models, tmp_path / "work", "--engine", engine, "--questions", "1")
    for part in ("of 72 documents indexed and warm", "full prefill", "blend", "times sooner"):
        assert part in shown
