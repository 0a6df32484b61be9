"""``cacheblend doctor``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import count_progress, print_json, print_note, working
from cacheblend_rag.divergence import MOST_KL
from cacheblend_rag.errors import ChunkTooLongError, PromptTooLongError, ServerError, UnsupportedModelError

if TYPE_CHECKING:
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.diagnostics.checks import Check
    from cacheblend_rag.diagnostics.prompts import UserPrompt
    from cacheblend_rag.diagnostics.subjects import Subject
    from cacheblend_rag.diagnostics.sweep import SweepResult


def doctor(
    model: options.Model,
    engine: options.EngineName = "transformers",
    base_url: options.BaseUrl = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            "-s",
            metavar="DIR",
            parser=options.directory,
            help="Chunk store to check, and to make prompts from; with --engine server its catalogue.",
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
    ] = MOST_KL,
    ratio: options.Ratio = None,
    policy: Annotated[str | None, typer.Option(help="How tokens are chosen for that.")] = None,
    namespace: options.Namespace = "default",
    primer: options.Primer = None,
    codec: options.Codec = "raw",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Check a set-up, and compare blending with full prefill on prompts: how near, how soon, with which setting.

    Without --ratio and --policy it is the engine's own setting that is checked. Ends with 1 if a check fails.
    """
    options.show_no_bars(model)
    from cacheblend_rag import BlendConfig
    from cacheblend_rag.diagnostics.checks import Check, cannot_be_opened, check_versions
    from cacheblend_rag.diagnostics.doctor import judge, verdict
    from cacheblend_rag.diagnostics.prompts import read_prompts
    from cacheblend_rag.diagnostics.subjects import examine

    chosen = {"recompute_ratio": ratio, "policy": policy}
    given = {name: value for name, value in chosen.items() if value is not None}
    BlendConfig().with_overrides(given)  # what is wrong with it is told before anything is loaded
    own = None if prompts is None else read_prompts(prompts)  # so it is here
    checks = [check_versions()]
    found: SweepResult | None = None
    unreadable = cannot_be_opened(store, only_catalogue=engine == "server")
    usable = store if unreadable is None else None
    with contextlib.ExitStack() as stack:
        try:
            loaded = stack.enter_context(
                options.open_engine(
                    model,
                    usable,
                    engine=engine,
                    base_url=base_url,
                    namespace=namespace,
                    codec=codec,
                    primer=primer,
                    dtype=dtype,
                    device=device,
                )
            )
        except UnsupportedModelError as error:
            plain = "start it with cacheblend serve" if engine == "server" else "serve it without this package"
            checks.append(Check("model", False, str(error), f"{plain}, or choose another"))
        except ServerError as error:
            checks.append(Check("server", False, str(error), "start it, or give the --base-url that it has"))
        else:
            subject = stack.enter_context(contextlib.closing(examine(loaded, engine)))
            try:
                with working("checking the model"):
                    checks += _check(subject, usable, unreadable)
                if checks[1].ok:
                    found = _sweep(subject, usable, own, count, loaded.blend.with_overrides(given))
            except (ChunkTooLongError, PromptTooLongError) as error:
                checks.append(Check("prompts", False, str(error), "shorter ones, or fewer passages in each"))
            else:
                checks += [] if found is None else judge(found, most_kl=max_kl)
    said = verdict(checks, None if found is None else found.cheapest(max_kl))
    if json:
        print_json(_as_json(checks, found, said))
    else:
        _print(checks, found, max_kl)
        typer.echo(said)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _check(subject: Subject, store: Path | None, unreadable: Check | None) -> list[Check]:
    """All checks of the set-up, the model's first: without it there are no others."""
    from cacheblend_rag.diagnostics.prompts import sample_prompt

    model = subject.check_model()
    if not model.ok:
        return [model]
    prompt, chunks = sample_prompt(subject, 0)
    subject.warm(chunks)
    checks = [model, *subject.check_exactness(prompt, chunks)]
    return [*checks, *([unreadable] if unreadable else []), *subject.check_store(store)]


def _sweep(
    subject: Subject, store: Path | None, prompts: list[UserPrompt] | None, count: int, default: BlendConfig
) -> SweepResult:
    from cacheblend_rag.diagnostics.prompts import asked_prompts, prompts_of_store, sample_prompts
    from cacheblend_rag.diagnostics.sweep import settings_to_try, sweep

    if prompts is not None:
        asked = asked_prompts(prompts, subject)
    else:
        asked = [] if store is None else prompts_of_store(subject, store, count)
    if not asked:
        print_note("note: the prompts are sample text: give --prompts FILE, or a --store that was ingested")
        asked = sample_prompts(subject, count)
    with count_progress("prompt") as show:
        return sweep(asked, settings_to_try(default, subject.engine.num_layers), show, warm=subject.warm)


def _as_json(checks: list[Check], found: SweepResult | None, said: str) -> dict[str, Any]:
    return {
        "checks": [{"name": c.name, "ok": c.ok, "figure": c.figure, "advice": c.advice} for c in checks],
        "kl_is_lower_bound": found is not None and found.kl_is_bound,
        "settings": [] if found is None else [setting.to_dict() for setting in found.settings],
        "answers": [] if found is None else [{"full": full, "blended": mine} for full, mine in found.answers],
        "verdict": said,
    }


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
    figures = Table(title=f"prompts: {len(found.answers)}")
    kl = "KL a token, at least" if found.kl_is_bound else "KL a token"
    for column in ("setting", kl, "same token", "share of full prefill's TTFT", "largest part"):
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
