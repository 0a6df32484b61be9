"""The pages of the documentation, taken apart."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
READMES = sorted(ROOT.glob("integrations/*/README.md"))

MARKDOWN = MarkdownIt("commonmark").enable("table")


def name_of(page: Path) -> str:
    """For the names of tests."""
    return page.relative_to(ROOT).as_posix()


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Where it is.
        line: Its first line there, from 1.
        language: What the page calls it; empty for an indented block.
        code: Its text.
    """

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of code of a page."""
    for token in MARKDOWN.parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content)


def inline(page: Path) -> Iterator[Token]:
    """Texts, links, images and code in lines, each before what is inside it."""

    def walk(tokens: list[Token]) -> Iterator[Token]:
        for token in tokens:
            yield token
            yield from walk(token.children or [])

    return walk(MARKDOWN.parse(page.read_text()))


def table_below(page: Path, heading: str) -> dict[str, list[str]]:
    """The first table below a heading: its other cells by the names in backquotes in the first cell of each row."""
    tokens = iter(MARKDOWN.parse(page.read_text()))
    assert any(token.type == "inline" and token.content == heading for token in tokens), f"no heading {heading!r}"
    assert any(token.type == "tbody_open" for token in tokens), f"no table below {heading!r}"
    rows: dict[str, list[str]] = {}
    cells: list[str] = []
    for token in tokens:
        if token.type == "inline":
            cells.append(token.content)
        elif token.type == "tr_close":
            rows |= {name: cells[1:] for name in re.findall(r"`([^`]+)`", cells[0])}
            cells = []
        elif token.type == "table_close":
            break
    return rows
