"""The ``cacheblend`` command.

Nothing here imports torch: ``--help`` is quick, and each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import cacheblend_rag
from cacheblend_rag.cli import dashboard, doctor, ingest, inspect, profile, query, serve, store
from cacheblend_rag.cli.console import print_error
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.logs import LEVEL_VARIABLE, log_to_stderr


class _Commands(TyperGroup):
    """Turns the errors users meet into one line, and takes ``--debug`` anywhere on the command line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(arg for arg in args[:end] if arg != "--debug"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read our output has gone: nothing to say, and typer says it
        except (CacheBlendError, OSError) as error:
            if ctx.params["debug"]:
                raise
            print_error(error)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answer questions over documents whose KV was computed before: only what must be is computed again.",
)
app.command("ingest")(ingest.ingest)
app.command("query")(query.query)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command("profile")(profile.profile)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.command("dashboard")(dashboard.dashboard)
app.add_typer(store.app, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cacheblend {cacheblend_rag.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL", envvar=LEVEL_VARIABLE, help="Log to stderr: debug (a line a prompt), info, warning, error."
        ),
    ] = None,
) -> None:
    if log_level is not None:
        log_to_stderr(log_level)
        os.environ[LEVEL_VARIABLE] = log_level  # for the processes that vLLM starts


def main() -> None:
    """Run the command line."""
    app(prog_name="cacheblend")
