"""What the benchmarks share: the machine they ran on, and prompts out of the example corpus."""

from __future__ import annotations

import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
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


def rag_messages(passages: list[str], question: str) -> list[dict[str, str]]:
    """A question behind passages, as a chat."""
    content = "\n\n".join([*passages, f"Question: {question}"])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def system_prefix(render_chat: Callable[[list[dict[str, str]]], str]) -> str:
    """What the prompts of :func:`rag_messages` begin with: a rendered chat up to the user's first word."""
    mark = "\x00"
    return render_chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": mark}]).split(mark)[0]


def corpus_documents() -> dict[str, str]:
    """The documents of the example corpus, by their path in it."""
    return {str(path.relative_to(CORPUS)): path.read_text("utf-8") for path in sorted((CORPUS / "docs").iterdir())}


def corpus_questions(
    count_tokens: Callable[[str], int], *, tokens: int, seed: int
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """All questions of the example corpus in random order, each with its documents among others in random order.

    Args:
        count_tokens: Counts tokens.
        tokens: Least tokens of passages for each.
        seed: Chooses the other documents, and the orders.

    Yields:
        The question's record (``question``, ``answer``, ...) and its passages.
    """
    rng = np.random.default_rng(seed)
    texts = corpus_documents()
    sizes = {name: count_tokens(text) for name, text in texts.items()}
    questions = [json.loads(line) for line in (CORPUS / "questions.jsonl").read_text("utf-8").splitlines()]
    for number in rng.permutation(len(questions)):
        chosen = list(questions[number]["documents"])
        others = [name for name in texts if name not in chosen]
        for other in rng.permutation(len(others)):
            if sum(sizes[name] for name in chosen) >= tokens:
                break
            chosen.append(others[other])
        yield questions[number], [texts[chosen[n]] for n in rng.permutation(len(chosen))]


def corpus_prompts(
    render_chat: Callable[[list[dict[str, str]]], str],
    count_tokens: Callable[[str], int],
    *,
    prompts: int,
    tokens: int,
    seed: int,
) -> tuple[list[str], list[str]]:
    """Some of :func:`corpus_questions` as prompts.

    Args:
        render_chat: Makes a prompt of messages.
        count_tokens: Counts tokens.
        prompts: How many prompts.
        tokens: Least tokens of passages in each.
        seed: Chooses questions, documents and their order.

    Returns:
        All documents, and the prompts.
    """
    asked = itertools.islice(corpus_questions(count_tokens, tokens=tokens, seed=seed), prompts)
    made = [render_chat(rag_messages(passages, record["question"])) for record, passages in asked]
    return list(corpus_documents().values()), made


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write results with what is needed to repeat them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command(), "machine": machine(), **document}, indent=2) + "\n")
