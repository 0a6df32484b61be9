"""The Python in the documentation runs. What needs vLLM is compiled, and what it names of ours is there."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import DeterministicFakeEmbedding
from llama_index.core import MockEmbedding
from prometheus_client import REGISTRY

from cacheblend_rag import BlendConfig, Engine, load_engine

from .conftest import DOCS, PAGES, ROOT, Block, blocks, name_of

# Pages whose blocks are run, one after the other, but for those that need vLLM or a server of it. Blocks of other pages
# are compiled only: add a page when it has some.
RUN = (
    "README.md",
    "docs/guard.md",
    "docs/langchain.md",
    "docs/llama-index.md",
    "docs/looking-inside.md",
    "docs/metrics.md",
    "docs/operations.md",
    "docs/policies.md",
    "docs/start.md",
    "docs/vllm.md",
)
OURS = ("cacheblend_rag", "langchain_cacheblend", "llama_index.llms.cacheblend")
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


def python(page: Path) -> list[Block]:
    """The blocks of a page that are Python."""
    return [block for block in blocks(page) if block.language == "python"]


def needs_vllm(block: Block) -> bool:
    """Whether a block can't be run here."""
    return re.search(r'engine="(server|vllm)"', block.code) is not None


@pytest.fixture(scope="module")
def engine(small_smollm2: str) -> Iterator[Engine]:
    """One whose chunks are in memory, and that blends whatever it can."""
    with load_engine(small_smollm2, dtype="float32", device="cpu", blend=BlendConfig(mode="blend")) as loaded:
        yield loaded


@pytest.fixture
def names(
    engine: Engine, small_smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Any]]:
    """What the blocks of a page may use without having made it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "_observers", ())
    draw = random.Random(0)
    words = [f"{start}{end}" for start in ("bri", "har", "mar", "tol") for end in ("dge", "bour", "ket", "vern", "low")]
    chunks = [f"Passage {n}. " + " ".join(draw.choices(words, k=80)) + "." for n in range(4)]
    question = "Question: who designed the bridge of the harbour, and in which year was that?"
    engine.warm(chunks)
    names = {
        "MODEL": small_smollm2,
        "engine": engine,
        "chunks": chunks,
        "retrieved": [chunks[2], chunks[0]],
        "question": question,
        "prompt": f"{chunks[3]}\n\n{chunks[1]}\n\n{question}",
        "embeddings": DeterministicFakeEmbedding(size=8),
        "embed_model": MockEmbedding(8),
    }
    collectors = set(REGISTRY._collector_to_names)
    ours, root = logging.getLogger("cacheblend_rag"), logging.getLogger()
    level, handlers = ours.level, [*root.handlers]
    yield names
    ours.setLevel(level)
    root.handlers[:] = handlers
    for collector in set(REGISTRY._collector_to_names) - collectors:
        REGISTRY.unregister(collector)
    for value in [*names.values(), *(getattr(value, "engine", None) for value in names.values())]:
        if isinstance(value, Engine) and value is not engine:
            value.close()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_blocks_run(page: Path, names: dict[str, Any], small_smollm2: str) -> None:
    if name_of(page) not in RUN:
        pytest.skip("not in RUN: its blocks are compiled, and what they import is looked up")
    for block in python(page):
        if needs_vllm(block):
            continue
        code = block.code.replace("Qwen/Qwen2.5-1.5B-Instruct", small_smollm2).replace('"MODEL"', "MODEL")
        try:
            exec(compile(code, block.place, "exec"), names)
        except Exception as error:
            pytest.fail(f"{block.place}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_what_blocks_name_of_ours_exists(page: Path) -> None:
    for block in python(page):
        assert list(missing(compile(block.code, block.place, "exec", ast.PyCF_ONLY_AST))) == [], block.place


def test_what_does_not_exist_is_found() -> None:
    code = (
        "import cacheblend_rag.nothing\nfrom cacheblend_rag import BlendConfig, Blends\n"
        "from langchain_cacheblend.x import y\n"
        "load_engine(MODEL, engin='vllm')\nBlendConfig(recomp_ratio=0.1)\nimport numpy.nothing"
    )
    assert list(missing(ast.parse(code))) == [
        "cacheblend_rag.nothing",
        "cacheblend_rag.Blends",
        "langchain_cacheblend.x.y",
        "load_engine(engin=)",
        "BlendConfig(recomp_ratio=)",
    ]


def missing(tree: ast.AST) -> Iterator[str]:
    """Names of our packages that code imports, and arguments that it gives, which are not there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(OURS) and not found(alias.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OURS):
            wanted = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name for name in wanted if not found(name))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLED:
            known = inspect.signature(CALLED[node.func.id]).parameters
            given = (keyword.arg for keyword in node.keywords if keyword.arg is not None)
            yield from (f"{node.func.id}({name}=)" for name in given if name not in known)


CALLED: dict[str, Any] = {"load_engine": load_engine, "BlendConfig": BlendConfig}


def found(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, last = name.rpartition(".")
    try:
        if hasattr(importlib.import_module(module), last):
            return True
        importlib.import_module(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("page", [DOCS / "start.md", ROOT / "README.md"], ids=name_of)
def test_changes_of_two_lines_name_what_there_is(page: Path) -> None:
    import langchain_cacheblend
    from llama_index.llms import cacheblend

    there = {*langchain_cacheblend.__all__, *cacheblend.__all__}
    diffs = [block for block in blocks(page) if block.language == "diff"]
    assert len(diffs) == 2
    for block in diffs:
        after = "\n".join(line[1:] for line in block.code.splitlines() if not line.startswith("-"))
        used = {node.id for node in ast.walk(ast.parse(after)) if isinstance(node, ast.Name)}
        assert used & there and {name for name in used if "CacheBlend" in name} <= there
        added = [line for line in block.code.splitlines() if line.startswith("+")]
        assert len(added) == 2, block.place
