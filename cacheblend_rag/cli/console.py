"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from cacheblend_rag.ingestion import IngestProgress

# Without a terminal, progress is a line once in so many seconds: what is quick says nothing.
_QUIET_SECONDS = 2.0


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_note(text: str) -> None:
    """Print one line on stderr."""
    typer.echo(" ".join(line.strip() for line in text.splitlines()), err=True)


def print_error(error: Exception | str) -> None:
    """Print ``error: ...``, one line, on stderr."""
    # str() of an OSError from the system shows its number and a quoted path: say it as cat or ls would.
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        error = f"{os.fsdecode(error.filename)}: {error.strerror}"
    print_note(f"error: {error}")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show on stderr that something is being done: a spinner, or without a terminal a line if it takes a while."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(escape(what)):
            yield
        return
    teller = threading.Timer(_QUIET_SECONDS, print_note, [what])
    teller.start()
    try:
        yield
    finally:
        teller.cancel()


@contextlib.contextmanager
def ingest_progress() -> Iterator[Callable[[IngestProgress], None]]:
    """Show an ingestion's progress on stderr: a bar over the files, or a line now and then without a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        note = _note_now_and_then()
        yield lambda at: note(
            f"{at.files_done} of {at.files} files done, {at.file}: {at.chunks_done} of {at.chunks} chunks"
        )
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def show(at: IngestProgress) -> None:
            chunks = f", chunk {at.chunks_done} of {at.chunks}" if at.chunks else ""
            bar.update(
                task, total=at.files, completed=at.files_done, description=escape(f"{Path(at.file).name}{chunks}")
            )

        yield show


@contextlib.contextmanager
def count_progress(noun: str) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how many of some things are done, likewise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        note = _note_now_and_then()
        yield lambda done, total: note(f"{done} of {plural(total, noun)} done")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{noun}s", total=None)
        yield lambda done, total: bar.update(task, total=total, completed=done)


def _note_now_and_then() -> Callable[[str], None]:
    told = time.monotonic()

    def note(text: str) -> None:
        nonlocal told
        if time.monotonic() - told >= _QUIET_SECONDS:
            told = time.monotonic()
            print_note(text)

    return note


def readable_bytes(size: float) -> str:
    """A size such as ``3.1 MiB``."""
    if size < 1024:
        return f"{size:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(size, 1024)), len(units))
    return f"{size / 1024**power:.1f} {units[power - 1]}"


def plural(count: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
