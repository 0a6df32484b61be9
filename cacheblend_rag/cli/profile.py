"""``cacheblend profile``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import count_progress, print_json, print_note

if TYPE_CHECKING:
    from cacheblend_rag.model_profile import ModelProfile


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id.")],
    store: options.Store,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Questions of your own: JSON lines with "question", "answer" and "passages", a list of texts.',
        ),
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Ask so many of them, the first ones.")] = None,
    ratio: Annotated[float, typer.Option(help="Share of the reused tokens to recompute, above 0 and below 1.")] = 0.15,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Measure in which layers the question shows best what to recompute, and keep that for engines with this store.

    It takes some minutes, more on a large model. Run it again with more questions: the last profile counts.
    """
    if not 0 < ratio < 1:
        raise typer.BadParameter("--ratio must be above 0 and below 1")
    from cacheblend_rag.model_profile import write_profile
    from cacheblend_rag.profiling_data import BUILT_IN, read_questions
    from cacheblend_rag.store import open_store

    asked = read_questions(BUILT_IN if data is None else data)
    # Before anything is measured: a store that can't be opened is told at once.
    with contextlib.closing(open_store(store, memory_bytes=0)) as opened:
        # A store in memory: what is warmed for measuring is none of the user's chunks.
        with options.open_engine(
            model,
            None,
            engine="transformers",
            base_url=None,
            namespace="default",
            codec="raw",
            primer=None,
            dtype=dtype,
            device=device,
        ) as loaded:
            from cacheblend_rag.engines.transformers import TransformersEngine
            from cacheblend_rag.profiling import make_profile, measure

            assert isinstance(loaded, TransformersEngine)
            with count_progress("question") as show:
                found = measure(loaded, asked, limit=questions, ratio=ratio, progress=show)
            made = make_profile(loaded, found, ratio=ratio)
        path = write_profile(opened, made)
    if json:
        print_json({"path": str(path), **made.to_dict()})
    else:
        _print_table(made, path)
    for reason in found.left_out:
        print_note(f"note: left out: {reason}")


def _print_table(made: ModelProfile, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from cacheblend_rag.profiling import too_few

    measured = made.measured
    baseline = measured["candidates"][0]
    table = Table(title=f"{measured['questions']} questions, {measured['recompute_ratio']:g} recomputed")
    for column in ("layers", "closure", "KL", "median KL", "better : worse"):
        table.add_column(column, justify="left" if column == "layers" else "right")
    for row in measured["candidates"]:
        first, end = row["layers"]
        closure = "" if row["closure"] is None else f"{row['closure']:.2f}"
        against = "last half" if row is baseline else f"{row['wins']} : {row['losses']}"
        chosen = "bold" if tuple(row["layers"]) == made.question_layers else None
        table.add_row(
            f"{first} to {end - 1}", closure, f"{row['kl']:.3g}", f"{row['median_kl']:.2g}", against, style=chosen
        )
    Console().print(table)
    first, end = made.question_layers
    why = "none is better beyond chance" if [first, end] == baseline["layers"] else "better than the last half"
    if too_few(measured["questions"], len(measured["candidates"])):
        why = "too few questions to tell"
    typer.echo(f"question_layers of {made.model}: {first} to {end - 1} of {made.num_layers} ({why})")
    typer.echo(f"kept in {path}")
