"""The examples, as a user would run them, on a few documents of the corpus."""

from __future__ import annotations

import contextlib
import difflib
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = ("tolvern-dam.md", "river-asmer.md", "speech-hamm-durane-1912.txt")
EDITED = ("92 metres", "93 metres")
FRAMEWORKS = ("langchain", "llama_index")

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(example_models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a script and returns its globals. In this process: most of the time goes into importing libraries."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(script: str, *arguments: str | Path) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), "--models", str(example_models)])
        return runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in DOCS:
        shutil.copy(EXAMPLES / "corpus" / "docs" / name, docs / name)
    return docs


def chunk_files(work: Path) -> dict[Path, int]:
    """When each chunk was written."""
    return {path: path.stat().st_mtime_ns for path in (work / "kv").rglob("*.safetensors")}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_ingest_and_ask(
    framework: str, run: Run, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"

    def ingest() -> tuple[int, int, int]:
        """Chunks that are warm, that were warmed, that were evicted."""
        run(f"{framework}/ingest.py", docs, "--work", work)
        found = re.search(r"(\d+) warm: (\d+) warmed now, (\d+) evicted", capsys.readouterr().out)
        assert found
        return int(found[1]), int(found[2]), int(found[3])

    (docs / "notes.html").write_text("<html><body><nav>Home</nav><p>The ferry leaves at nine.</p></body></html>")
    count, warmed, evicted = ingest()
    assert (warmed, evicted) == (count, 0)
    assert count > len(DOCS)
    first = chunk_files(work)
    assert len(first) == count

    assert ingest() == (count, 0, 0)
    assert chunk_files(work) == first

    dam = docs / DOCS[0]
    text = dam.read_text(encoding="utf-8")
    assert text.count(EDITED[0]) == 1
    dam.write_text(text.replace(*EDITED), encoding="utf-8")
    (docs / "notes.html").unlink()
    assert ingest() == (count - 1, 1, 2)  # one chunk was edited, one is gone with its file
    third = chunk_files(work)
    assert len(third.items() & first.items()) == count - 2

    usage = ask(framework, run, work)
    assert usage["cache_read"] > usage["cacheblend_missed"]
    assert "first words after" in capsys.readouterr().out
    assert chunk_files(work) == third  # all that the prompt held was warm

    if framework == "langchain":  # the other one needs a package that is not among our dependencies
        run("langchain/app_before.py", "--work", work, "--passages", "2", "--max-tokens", "2")
        assert "first words after" in capsys.readouterr().out


def ask(framework: str, run: Run, work: Path) -> dict[str, int]:
    """How the prompt of app_after.py was read, in tokens."""
    arguments = ("--work", work, "--passages", "4", "--max-tokens", "4")
    with collected_usage(framework) as usage:
        left = run(f"{framework}/app_after.py", *arguments)
    left["model" if framework == "langchain" else "llm"].engine.close()
    return usage


@contextlib.contextmanager
def collected_usage(framework: str) -> Iterator[dict[str, int]]:
    usage: dict[str, int] = {}
    if framework == "langchain":
        from langchain_core.callbacks import get_usage_metadata_callback

        with get_usage_metadata_callback() as collected:
            yield usage
        (of_model,) = collected.usage_metadata.values()
        usage.update(of_model["input_token_details"])
        return
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler
    from llama_index.core.instrumentation.events.llm import LLMChatEndEvent

    class Collect(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            if isinstance(event, LLMChatEndEvent):
                stats = event.response.additional_kwargs["stats"]
                usage.update(
                    cache_read=stats["reused_tokens"] + stats["prefix_tokens"],
                    cacheblend_missed=stats["missed_tokens"],
                )

    handlers = get_dispatcher().event_handlers
    collect = Collect()
    handlers.append(collect)
    try:
        yield usage
    finally:
        handlers.remove(collect)


@pytest.mark.parametrize(("framework", "removed", "added"), [("langchain", 3, 4), ("llama_index", 4, 3)])
def test_little_changes_in_an_app(framework: str, removed: int, added: int) -> None:
    before, after = ((EXAMPLES / framework / f"app_{when}.py").read_text().splitlines() for when in ("before", "after"))
    changes = [line[0] for line in difflib.ndiff(before, after)]
    assert 0 < changes.count("-") <= removed
    assert 0 < changes.count("+") <= added


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_notebook(framework: str, example_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEBLEND_TEST_MODEL", str(example_models / "smollm2-135m-instruct"))
    monkeypatch.setenv("CACHEBLEND_TEST_EMBEDDINGS", str(example_models / "all-minilm-l6-v2"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / f"{framework}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    )
    client.execute()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    assert "'decision': 'blend'" in printed
    assert re.search(r"full prefill: \d+\.\d\d s, blended: \d+\.\d\d s", printed)
    assert "warmed again: 1 of" in printed
