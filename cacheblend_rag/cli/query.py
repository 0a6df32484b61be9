"""``cacheblend query``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.asking import messages, retrieve, what_store_lacks
from cacheblend_rag.cli.console import print_json, print_note, working
from cacheblend_rag.cli.tracing import trace_as_text
from cacheblend_rag.stats import PARTS

if TYPE_CHECKING:
    from cacheblend_rag.catalog import Passage
    from cacheblend_rag.stats import BlendStats, Generation


def query(
    model: options.Model,
    store: options.Store,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help="What to ask the corpus.")] = None,
    engine: options.EngineName = "transformers",
    base_url: options.BaseUrl = None,
    top_k: Annotated[int, typer.Option(min=1, help="Most passages to retrieve.")] = 6,
    ratio: options.Ratio = 0.15,
    policy: Annotated[str, typer.Option(help="How tokens are chosen for that.")] = "query_aware",
    forced_tokens: Annotated[
        int, typer.Option(help="First tokens of each run of a chunk that are among them in any case.")
    ] = 0,
    mode: Annotated[
        str, typer.Option(help="auto: blend where it pays; blend: wherever a chunk is known; off: never.")
    ] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The whole prompt, instead of a question and retrieval; - is stdin."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer by full prefill too.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Tell where the time went, what was recomputed, and by what scores.")
    ] = False,
    trace_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write where the time went as a trace for Perfetto or about:tracing."),
    ] = None,
    request_log: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append how the prompt was read, for cacheblend dashboard --requests FILE."),
    ] = None,
    namespace: options.Namespace = "default",
    primer: options.Primer = None,
    codec: options.Codec = "raw",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Answer a question from an ingested corpus, or answer a prompt as it stands."""
    if (question is None) == (prompt_file is None):
        raise typer.BadParameter("give either a QUESTION or --prompt-file")
    from cacheblend_rag import BlendConfig

    for option, path in (("--trace-file", trace_file), ("--request-log", request_log)):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.parent} for {option}")
    prompt = None if prompt_file is None else options.read_text(prompt_file)
    blend = BlendConfig(recompute_ratio=ratio, policy=policy, forced_tokens=forced_tokens, mode=mode)  # type: ignore[arg-type]  # it checks
    options.require_store(store)
    with options.open_engine(
        model,
        store,
        engine=engine,
        base_url=base_url,
        namespace=namespace,
        codec=codec,
        primer=primer,
        dtype=dtype,
        device=device,
        blend=blend,
    ) as loaded:
        passages: list[Passage] = []
        if prompt is None:
            assert question is not None  # one of both is given
            passages = retrieve(loaded, engine, store, question, top_k)
            prompt = loaded.render_chat(messages(question, passages))
        with working("answering"):
            if compare:  # what is set up once, on first use, must not count against whoever comes first
                loaded.generate("warm-up", max_tokens=1, blend={"mode": "off"})
            if request_log is not None:  # not before the warm-up, which nobody asked for
                from cacheblend_rag.diagnostics.request_log import RequestLog

                loaded.add_observer(RequestLog(loaded, request_log))
            answer = loaded.generate(prompt, max_tokens=max_tokens, trace=trace)
            full = loaded.generate(prompt, max_tokens=max_tokens, blend={"mode": "off"}) if compare else None
        if not answer.segments and (lacking := what_store_lacks(loaded, engine, store)):
            print_note(f"note: {lacking}")

    if json:
        print_json(_as_json(answer, full, passages))
    else:
        typer.echo(_as_text(answer, full, passages))
        if trace:
            typer.echo(trace_as_text(answer))
    if trace_file is not None:
        from cacheblend_rag.diagnostics.timeline import write_timeline

        write_timeline({"answer": answer.stats} | ({} if full is None else {"full prefill": full.stats}), trace_file)


def _as_json(answer: Generation, full: Generation | None, passages: Sequence[Passage]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "stats": answer.stats.to_dict(),
        "passages": [dataclasses.asdict(passage) for passage in passages],
    }
    if answer.trace is not None:
        document["trace"] = answer.trace.to_dict()
    if full is not None:
        document["full_prefill"] = {
            "answer": full.text,
            "finish_reason": full.finish_reason,
            "stats": full.stats.to_dict(),
            "ttft_ratio": full.stats.ttft / answer.stats.ttft,
        }
    return document


def _as_text(answer: Generation, full: Generation | None, passages: Sequence[Passage]) -> str:
    stats = answer.stats
    lines = [
        answer.text.strip(),
        "",
        f"decision  {stats.decision}: {stats.reason}",
        f"tokens    {stats.prompt_tokens:,} = {stats.reused_tokens:,} reused + {stats.recomputed_tokens:,} recomputed"
        f" + {stats.missed_tokens:,} missed + {stats.prefix_tokens:,} exact prefix",
        f"ttft      {_seconds(stats)}",
    ]
    if full is not None:
        lines += [
            "",
            "full prefill",
            full.text.strip(),
            "",
            f"ttft      {_seconds(full.stats)}",
            f"speed-up  {full.stats.ttft / stats.ttft:.2f}",
        ]
    if passages:
        lines += ["", "passages"]
        lines += [f"  {_near(passage.source)} #{passage.position}  {passage.score:.2f}" for passage in passages]
    return "\n".join(lines)


def _seconds(stats: BlendStats) -> str:
    parts = ", ".join(f"{part.replace('_', ' ')} {getattr(stats, part):.3f}" for part in PARTS)
    return f"{stats.ttft:.3f} s ({parts})"


def _near(source: str) -> str:
    """A path as seen from here, if it is below."""
    path, here = Path(source), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
