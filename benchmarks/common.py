"""What the benchmarks share: the machine they ran on, and prompts out of the example corpus."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CORPUS = Path(__file__).parents[1] / "examples" / "corpus"
SYSTEM = "Answer the question from the passages, in a few words."


def machine() -> dict[str, Any]:
    """What must be known of the machine to read the numbers."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def command() -> str:
    """The command that is running, absolute paths cut to their last part."""
    arguments = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def corpus_prompts(
    render_chat: Callable[[list[dict[str, str]]], str],
    count_tokens: Callable[[str], int],
    *,
    prompts: int,
    tokens: int,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Questions of the example corpus behind whole documents in random order, those that answer them among them.

    Args:
        render_chat: Makes a prompt of messages.
        count_tokens: Counts tokens.
        prompts: How many prompts.
        tokens: Least tokens of passages in each.
        seed: Chooses questions, documents and their order.

    Returns:
        All documents, and the prompts.
    """
    rng = np.random.default_rng(seed)
    texts = {str(path.relative_to(CORPUS)): path.read_text("utf-8") for path in sorted((CORPUS / "docs").iterdir())}
    sizes = {name: count_tokens(text) for name, text in texts.items()}
    questions = [json.loads(line) for line in (CORPUS / "questions.jsonl").read_text("utf-8").splitlines()]
    made = []
    for number in rng.permutation(len(questions))[:prompts]:
        chosen = list(questions[number]["documents"])
        others = [name for name in texts if name not in chosen]
        for other in rng.permutation(len(others)):
            if sum(sizes[name] for name in chosen) >= tokens:
                break
            chosen.append(others[other])
        passages = [texts[chosen[n]] for n in rng.permutation(len(chosen))]
        content = "\n\n".join([*passages, f"Question: {questions[number]['question']}"])
        made.append(render_chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]))
    return list(texts.values()), made


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write results with what is needed to repeat them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command(), "machine": machine(), **document}, indent=2) + "\n")
