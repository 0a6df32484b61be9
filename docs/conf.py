"""How Sphinx builds this directory: `make docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import cacheblend_rag

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "cacheblend_rag"
release = cacheblend_rag.__version__
copyright = "The cacheblend_rag authors. Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_reference"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"cacheblend_rag {release}"
html_copy_source = False
html_show_sphinx = False

# The anchors that GitHub gives to headings.
myst_heading_anchors = 4
# "--option" has two dashes.
smartquotes = False

# It takes a third of the time, and nothing of it is in the reference.
autodoc_mock_imports = ["transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Fields are told once, in the class's docstring.
napoleon_use_ivar = True


def list_new_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put pages that the first page's contents don't name yet where they say ``*``.

    Sphinx's own ``*`` would list those again that are named.
    """
    if docname == app.config.root_doc:
        named = set(re.findall(r"^[\w-]+$", source[0], re.MULTILINE))
        new = sorted(app.env.found_docs - named - {docname})
        source[0] = re.sub(r"^\*$", "\n".join(new), source[0], flags=re.MULTILINE)


def link_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make Markdown that stands outside this directory, and so is no page of the site, a file to download."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", list_new_pages)
    app.connect("source-read", link_outside)
