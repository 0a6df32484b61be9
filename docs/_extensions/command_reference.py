"""The directive ``cacheblend-commands``: what ``--help`` says of every command, from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from cacheblend_rag.cli import app as cacheblend


class CommandReference(SphinxDirective):
    """Takes no arguments. A section for each command."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        text = "\n".join(describe(typer.main.get_command(cacheblend), "cacheblend"))
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def describe(command: Any, name: str) -> Iterator[str]:
    """Lines of Markdown on a command and those below it."""
    context = command.context_class(command, info_name=name)
    yield f"## {name}\n\n{command.help}\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```console\n$ {name} {usage}\n```\n"
    described = [found for parameter in command.params if (found := parameter.get_help_record(context))]
    yield from ("| | |\n|---|---|", *(f"| `{names}` | {_cell(text)} |" for names, text in described), "")
    for child in getattr(command, "commands", {}).values():
        yield from describe(child, f"{name} {child.name}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("[", "\\[")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("cacheblend-commands", CommandReference)
    return {"parallel_read_safe": True}
