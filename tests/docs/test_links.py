"""Every link within the documentation leads somewhere; those that lead out of it are at least addresses."""

from __future__ import annotations

import itertools
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import MARKDOWN, PAGES, READMES, inline, name_of


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    times: Counter[str] = Counter()
    tokens = MARKDOWN.parse(page.read_text())
    for opening, heading in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children or [] if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
            times[slug] += 1
    return found


def problems(page: Path) -> Iterator[str]:
    """What is wrong with the links and pictures of a page."""
    for token in inline(page):
        target = token.attrGet("src" if token.type == "image" else "href") if token.type in LINKS else None
        if target is None:
            continue
        url = urllib.parse.urlsplit(str(target))
        if url.scheme:
            host = url.hostname or ""
            if url.scheme not in ("http", "https") or ("." not in host and host != "localhost"):
                yield f"{target} is no address"
            continue
        path = (page.parent / urllib.parse.unquote(url.path)) if url.path else page
        if not path.exists():
            yield f"{target}: there is no such file"
        elif url.fragment and (path.suffix != ".md" or urllib.parse.unquote(url.fragment) not in anchors(path)):
            yield f"{target}: there is no such heading"
        if token.type == "image" and not token.content:
            yield f"{target} has no text for those who can't see it"


LINKS = ("link_open", "image")


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(problems(page)) == []


def test_what_is_wrong_with_links_is_found(tmp_path: Path) -> None:
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# A `title`, with more\n\n## Twice\n\n## Twice\n")
    page.write_text(
        "# Here\n\n[a](other.md) [b](other.md#a-title-with-more) [c](#here) [d](other.md#twice-1) [e](https://a.org/b)\n"
        "\n| |\n|---|\n| [no file](gone.md) [no heading](other.md#twice-2) [nor here](#there) |\n\n"
        "[no address](https:/a.org) ![](other.md) [not a page](page.txt#x)\n"
    )
    (tmp_path / "page.txt").touch()

    assert [problem.split()[0].strip(":") for problem in problems(page)] == [
        "gone.md",
        "other.md#twice-2",
        "#there",
        "https:/a.org",
        "other.md",
        "page.txt#x",
    ]
