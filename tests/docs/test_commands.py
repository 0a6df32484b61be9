"""What the documentation has one type exists: commands and their options, make's targets, scripts and theirs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cacheblend_rag.cli import app

from .conftest import DOCS, PAGES, READMES, ROOT, blocks, inline, name_of

# Of vLLM's server, in lines that begin with `cacheblend serve`.
VLLM_OPTIONS = {"--port", "--host", "--max-model-len", "--tensor-parallel-size", "--gpu-memory-utilization"}
SAMPLES = {"python", "diff", "toml", "json", "yaml", "promql"}  # in which nothing is typed


def typed(page: Path, program: str) -> Iterator[tuple[str, str]]:
    """What follows a program in the lines of blocks that run it, with where they are."""
    for block in blocks(page):
        if block.language in SAMPLES or block.language.startswith("{"):
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.startswith(f"{program} "):
                yield block.place, line.removeprefix(f"{program} ")


def mentioned(page: Path, program: str) -> Iterator[str]:
    """The same between backquotes; there a command need not be whole."""
    for token in inline(page):
        if token.type == "code_inline" and token.content.startswith(f"{program} "):
            yield token.content.removeprefix(f"{program} ")


def words_of(line: str) -> list[str]:
    """As a shell splits it."""
    return shlex.split(line, comments=True)


@pytest.fixture(scope="module")
def parse() -> Callable[[list[str]], None]:
    """Parses words as the command line does, runs nothing, and raises what typer does."""
    root: Any = typer.main.get_command(app)
    extra: list[str] = []

    def tame(command: Any) -> None:
        command.callback = None
        for child in getattr(command, "commands", {}).values():
            tame(child)

    def keep_extra(context: Any) -> None:
        extra.extend(word for word in context.args if word.startswith("-"))

    tame(root)
    root.commands["serve"].invoke = keep_extra

    def parse(words: list[str]) -> None:
        extra.clear()
        root.main(args=words, prog_name="cacheblend", standalone_mode=False)
        assert set(extra) <= VLLM_OPTIONS, f"neither ours nor among those of vLLM that we know: {extra}"

    return parse


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_command_lines_are_understood(page: Path, parse: Callable[[list[str]], None]) -> None:
    for place, line in typed(page, "cacheblend"):
        try:
            parse(words_of(line))
        except Exception as error:  # typer's own classes are private
            pytest.fail(f"{place}: cacheblend {line}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize(
    "line",
    [
        "ingst docs --model M --store S",
        "ingest docs --model M",
        "query Why --model M --store S --ration 0.3",
        "query Why --model M --store S --ratio much",
        "store rm",
        "serve M --store S --gpu-gb 3",
    ],
)
def test_wrong_command_lines_are_not(line: str, parse: Callable[[list[str]], None]) -> None:
    with pytest.raises((Exception, SystemExit)):
        parse(line.split())


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_commands_that_are_mentioned_exist(page: Path) -> None:
    for line in mentioned(page, "cacheblend"):
        assert unknown(words_of(line)) == [], f"{name_of(page)}: cacheblend {line}"


def test_mentions_of_what_is_not_there_are_found() -> None:
    assert unknown(["store", "verfy"]) == ["verfy"]
    assert unknown(["query", "--traces", "..."]) == ["--traces"]
    assert unknown(["--log-level", "debug", "query", "..."]) == []


def unknown(words: list[str]) -> list[str]:
    """Words of a command line, whole or not, that no command is named and no option."""
    command: Any = typer.main.get_command(app)
    options = {"--help"}
    missing = []
    for word in words:
        options |= {name for parameter in command.params for name in parameter.opts}
        children = getattr(command, "commands", {})
        if word in children:
            command = children[word]
        elif (word.startswith("-") and word not in options) or (
            children and command.name == "store" and not word.startswith("-")
        ):
            missing.append(word)
    return missing


def test_each_trouble_has_its_command() -> None:
    page = DOCS / "troubleshooting.md"
    lines = page.read_text().splitlines()
    first_lines = [next(filter(None, lines[n + 1 :])) for n, line in enumerate(lines) if line.startswith("## ")]

    assert len(first_lines) > 5
    assert [line for line in first_lines if not line.startswith("    cacheblend ")] == []


def test_vllm_page_names_the_options_of_serve() -> None:
    sentence = re.search(r"Options of its own are (.*?);", (DOCS / "vllm.md").read_text(), re.DOTALL)
    assert sentence is not None
    serve: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]

    named = set(re.findall(r"`(--[\w-]+)`", sentence[1]))
    assert named == {max(parameter.opts, key=len) for parameter in serve.params if parameter.opts[0].startswith("-")}


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = [line for _, line in typed(page, "make")] + list(mentioned(page, "make"))

    assert {line.split()[0] for line in used} <= targets


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_scripts_exist_and_know_their_options(page: Path) -> None:
    lines = [line for _, line in typed(page, "python")] + list(mentioned(page, "python"))
    for line in lines:
        if line.startswith(("benchmarks/", "examples/", "tools/")):
            script, *arguments = words_of(line)
            known = options_of(ROOT / script)
            for argument in arguments:
                assert not argument.startswith("--") or argument.partition("=")[0] in known, f"{script} {argument}"


def options_of(script: Path) -> set[str]:
    """The options that a script, or a module beside it or above, gives to argparse."""
    source = script.read_text()
    for module in re.findall(r"^from (\w+) import", source, re.MULTILINE):
        for beside in (script.parent / f"{module}.py", script.parents[1] / f"{module}.py"):
            source += beside.read_text() if beside.exists() else ""
    return set(re.findall(r'"(--[\w-]+)"', source))
