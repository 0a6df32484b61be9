"""The site builds without a warning, and holds what it should."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import langchain_cacheblend
import pytest
import typer
from llama_index.llms import cacheblend as llama_index_cacheblend
from sphinx.util.inventory import InventoryFile

import cacheblend_rag
from cacheblend_rag import errors
from cacheblend_rag.cli import app

from .conftest import DOCS, ROOT, blocks


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it, with one page more, which nothing names."""
    root = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry != DOCS:
            (root / entry.name).symlink_to(entry)
    shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns("_build", "__pycache__"))
    (root / "docs" / "brand-new.md").write_text("# A page that is new\n\nSee [settings](settings.md#load_engine).\n")
    make = re.search(r"^docs:.*\n\t\$\(BIN\)/python (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert make is not None
    run = subprocess.run([sys.executable, *make[1].split()], cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return root / "docs" / "_build" / "html"


def test_every_page_is_in_the_contents(site: Path) -> None:
    contents = re.findall(r'class="toctree-l1[^"]*"><a class="reference internal" href="([\w-]+)\.html"', read(site))
    pages = {path.stem for path in DOCS.iterdir() if path.suffix in (".md", ".rst")}

    assert len(contents) == len(set(contents))
    assert {*contents, "index"} == {*pages, "brand-new"}


def test_reference_has_every_public_name(site: Path) -> None:
    packages = {
        "cacheblend_rag": cacheblend_rag,
        "langchain_cacheblend": langchain_cacheblend,
        "llama_index.llms.cacheblend": llama_index_cacheblend,
    }
    public = {f"{name}.{entry}" for name, package in packages.items() for entry in package.__all__}
    public = {name for name in public if not hasattr(errors, name.rpartition(".")[2])}  # they are where they are raised
    public |= {f"cacheblend_rag.errors.{name}" for name, value in vars(errors).items() if isinstance(value, type)}
    public |= {
        "cacheblend_rag.store.open_store",
        "cacheblend_rag.trace.BlendTrace",
        "cacheblend_rag.policies.SelectionPolicy",
        "cacheblend_rag.policies.SelectionPolicy.select",
        "cacheblend_rag.diagnostics.prometheus.PrometheusMetrics",
        "cacheblend_rag.diagnostics.spans.Spans",
        "cacheblend_rag.Engine.generate",
        "cacheblend_rag.Engine.add_observer",
    }
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")

    described = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    assert public - described == set()


def test_reference_has_every_command_and_option(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", read(site, "cli.html"))

    def check(command: Any, name: str) -> None:
        assert f"{name}¶" in text.replace("#", "¶"), name  # a heading
        for parameter in command.params:
            assert all(option in text for option in parameter.opts if option.startswith("-")), parameter.opts
        for child in getattr(command, "commands", {}).values():
            check(child, f"{name} {child.name}")

    check(typer.main.get_command(app), "cacheblend")


def test_links_out_of_the_directory_are_downloads(site: Path) -> None:
    assert re.search(r'href="_downloads/\w+/README\.md"', read(site, "benchmarks.html"))
    assert re.search(r'href="_downloads/\w+/blending\.py"', read(site, "how-it-works.html"))


def test_pictures_are_as_they_are_drawn(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "draw_docs.py", tmp_path], check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}

    assert drawn == {path.name: path.read_text() for path in (DOCS / "pictures").iterdir()}
    for name, text in drawn.items():
        assert ElementTree.fromstring(text).find("{http://www.w3.org/2000/svg}title") is not None
        assert f"(pictures/{name})" in (DOCS / "how-it-works.md").read_text()


def test_pages_can_be_read_without_sphinx() -> None:
    for page in DOCS.glob("*.md"):
        directives = [block.language for block in blocks(page) if block.language.startswith("{")]
        assert set(directives) <= ({"{toctree}"} if page.name == "index.md" else {"{cacheblend-commands}"}), page.name


def read(site: Path, name: str = "index.html") -> str:
    return (site / name).read_text()
