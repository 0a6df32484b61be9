"""``cacheblend doctor``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import count_progress, print_json, print_note, working
from cacheblend_rag.errors import ChunkTooLongError, PromptTooLongError, UnsupportedModelError

if TYPE_CHECKING:
    from cacheblend_rag.diagnostics.checks import Check
    from cacheblend_rag.diagnostics.prompts import UserPrompt
    from cacheblend_rag.diagnostics.sweep import AskedPrompt, SweepResult
    from cacheblend_rag.engines.transformers import TransformersEngine


def doctor(
    model: options.Model,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            "-s",
            metavar="DIR",
            parser=options.directory,
            help="Chunk store to check, and to make prompts from.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Your prompts: JSON lines with "prompt" (its chunks in the store), or "question" and "passages".',
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Most prompts to make where none are given.")] = 4,
    max_kl: Annotated[
        float, typer.Option(min=0.0, help="How near to full prefill answers must be: KL in nats a token, the mean.")
    ] = 0.1,
    ratio: options.Ratio = 0.15,
    policy: Annotated[str, typer.Option(help="How tokens are chosen for that.")] = "query_aware",
    namespace: options.Namespace = "default",
    primer: options.Primer = None,
    codec: options.Codec = "raw",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Check a set-up, and compare blending with full prefill on prompts: how near, how soon, with which setting.

    The model runs in this process. Ends with 1 if a check fails.
    """
    from cacheblend_rag import BlendConfig
    from cacheblend_rag.diagnostics.checks import (
        Check,
        cannot_be_opened,
        check_model,
        check_store,
        check_versions,
    )
    from cacheblend_rag.diagnostics.doctor import judge, verdict
    from cacheblend_rag.diagnostics.prompts import read_prompts

    blend = BlendConfig(recompute_ratio=ratio, policy=policy)
    own = None if prompts is None else read_prompts(prompts)  # what is wrong with it is told before anything is loaded
    checks = [check_versions()]
    found: SweepResult | None = None
    unreadable = cannot_be_opened(store)
    usable = store if unreadable is None else None
    with contextlib.ExitStack() as stack:
        try:
            loaded = stack.enter_context(
                options.open_engine(
                    model,
                    usable,
                    engine="transformers",
                    base_url=None,
                    namespace=namespace,
                    codec=codec,
                    primer=primer,
                    dtype=dtype,
                    device=device,
                    blend=blend,
                )
            )
        except UnsupportedModelError as error:
            checks.append(Check("model", False, str(error), "serve it without this package, or choose another"))
        else:
            from cacheblend_rag.engines.transformers import TransformersEngine

            assert isinstance(loaded, TransformersEngine)
            checks.append(check_model(loaded))
            with working("checking the model"):
                checks += _check_exactness(loaded)
                checks += [unreadable] if unreadable else check_store(store, loaded)
            try:
                found = _sweep(loaded, stack, usable, own, count)
            except (ChunkTooLongError, PromptTooLongError) as error:
                checks.append(Check("prompts", False, str(error), "shorter ones, or fewer passages in each"))
            else:
                checks += judge(found, most_kl=max_kl)
    said = verdict(checks, None if found is None else found.cheapest(max_kl))
    if json:
        print_json(
            {
                "checks": [{"name": c.name, "ok": c.ok, "figure": c.figure, "advice": c.advice} for c in checks],
                "settings": [] if found is None else [setting.to_dict() for setting in found.settings],
                "answers": [] if found is None else [{"full": full, "blended": mine} for full, mine in found.answers],
                "verdict": said,
            }
        )
    else:
        _print(checks, found, max_kl)
        typer.echo(said)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _check_exactness(engine: TransformersEngine) -> list[Check]:
    from cacheblend_rag.diagnostics.checks import check_exactness
    from cacheblend_rag.diagnostics.prompts import fitting
    from cacheblend_rag.profiling_data import passages_of, read_questions

    questions = read_questions()
    return check_exactness(engine, *fitting(engine, passages_of(questions, 0), questions[0].text))


def _sweep(
    engine: TransformersEngine,
    stack: contextlib.ExitStack,
    store: Path | None,
    prompts: list[UserPrompt] | None,
    count: int,
) -> SweepResult:
    from cacheblend_rag.diagnostics.prompts import asked_prompts, prompts_of_store, sample_prompts
    from cacheblend_rag.diagnostics.sweep import settings_to_try, sweep
    from cacheblend_rag.store import open_store

    beside = stack.enter_context(engine.beside(open_store(None)))
    asked: list[AskedPrompt] = []
    if prompts is not None:
        asked = asked_prompts(prompts, engine, beside)
    elif store is not None and engine.stored_keys():
        asked = prompts_of_store(engine, store, count)
    if not asked:
        print_note("note: the prompts are sample text: give --prompts FILE, or a --store that was ingested")
        asked = sample_prompts(beside, count)
    with count_progress("prompt") as show:
        return sweep(asked, settings_to_try(engine.blend, engine.num_layers), show)


def _print(checks: list[Check], found: SweepResult | None, max_kl: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # answers may hold anything
    table = Table("", "check", "figure", "advice", title="cacheblend doctor")
    for check in checks:
        table.add_row("ok" if check.ok else "FAILS", check.name, check.figure, check.advice)
    console.print(table)
    if found is None:
        return
    cheapest = found.cheapest(max_kl)
    figures = Table(title=f"{len(found.answers)} prompts")
    for column in ("setting", "KL a token", "same token", "share of full prefill's TTFT", "largest part"):
        figures.add_column(column, justify="left" if column == "setting" else "right")
    for setting in found.settings:
        plain: dict[str, Any] = setting.to_dict()
        part = max(plain["parts"], key=plain["parts"].get)
        figures.add_row(
            setting.name,
            f"{setting.mean_kl:.4f}",
            f"{plain['top1_agreement']:.0%}",
            f"{setting.share:.2f}",
            f"{part} {plain['parts'][part]:.0%}",
            style="bold" if setting is cheapest else None,
        )
    console.print(figures)
    answers = Table("full prefill", f"{found.default.name}", title="answers")
    for full, mine in found.answers:
        answers.add_row(full.strip(), mine.strip())
    console.print(answers)
