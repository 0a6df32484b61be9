"""``cacheblend query``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import print_json, print_note, working
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.stats import PARTS

if TYPE_CHECKING:
    from cacheblend_rag.catalog import Passage
    from cacheblend_rag.chunks import ChunkScope
    from cacheblend_rag.engines.base import Engine
    from cacheblend_rag.stats import BlendStats, Generation

_SYSTEM = "Answer the question from the passages, briefly. If they do not hold the answer, say so."


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

    if trace_file is not None and not trace_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {trace_file.parent} for --trace-file")
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
            passages = _retrieve(loaded, engine, store, question, top_k)
            prompt = loaded.render_chat(_messages(question, passages))
        with working("answering"):
            if compare:  # what is set up once, on first use, must not count against whoever comes first
                loaded.generate("warm-up", max_tokens=1, blend={"mode": "off"})
            answer = loaded.generate(prompt, max_tokens=max_tokens, trace=trace)
            full = loaded.generate(prompt, max_tokens=max_tokens, blend={"mode": "off"}) if compare else None
        if not answer.segments and (lacking := _what_store_lacks(loaded, engine, store)):
            print_note(f"note: {lacking}")

    if json:
        print_json(_as_json(answer, full, passages))
    else:
        typer.echo(_as_text(answer, full, passages))
        if trace:
            typer.echo(_trace_as_text(answer))
    if trace_file is not None:
        from cacheblend_rag.diagnostics.timeline import write_timeline

        write_timeline({"answer": answer.stats} | ({} if full is None else {"full prefill": full.stats}), trace_file)


def _messages(question: str, passages: Sequence[Passage]) -> list[dict[str, str]]:
    # Passages first: the question reads them, and what a policy takes for the question is the end of the prompt.
    content = "\n\n".join([*(passage.text for passage in passages), f"Question: {question}"])
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]


def _retrieve(engine: Engine, engine_name: str, store: Path, question: str, top_k: int) -> list[Passage]:
    from cacheblend_rag.catalog import Catalog

    with Catalog(store, engine.scope) as catalog:
        if not catalog.sources():
            what = _what_store_lacks(engine, engine_name, store) or f"store {store} holds no corpus to search"
            namespace = engine.scope.namespace
            how = f"cacheblend ingest DIR --model {engine.model_name} --store {store} --namespace {namespace}"
            raise CacheBlendError(f"{what}; to ingest a corpus for this model: {how}")
        passages = catalog.search(question, top_k)
    if not passages:
        raise CacheBlendError("no passage of the corpus shares a word with the question: ask it in other words")
    return passages


def _what_store_lacks(engine: Engine, engine_name: str, store: Path) -> str:
    """Empty if the store holds chunks of the engine's scope, or none at all; otherwise a phrase that tells whose."""
    from cacheblend_rag.store import open_store

    if engine_name == "server":  # its chunks are elsewhere: only the catalogue is here
        return ""
    mine = engine.scope
    with contextlib.closing(open_store(store, memory_bytes=0)) as opened:
        held = {entry.scope for entry in opened.entries()}
    if mine in held or not held:
        return ""
    others = sorted({_describe(scope, mine) for scope in held})
    return f"store {store} holds no chunks of {_describe(mine, mine)}, only of {', '.join(others)}"


def _describe(scope: ChunkScope, mine: ChunkScope) -> str:
    model = scope.fingerprint
    codec = "" if model.codec == "raw" else f", codec {model.codec}"
    other_primer = ", another primer" if scope.primer_ids != mine.primer_ids else ""
    return f"{model.name} ({model.dtype}{codec}, namespace {scope.namespace}{other_primer})"


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


def _trace_as_text(answer: Generation) -> str:
    from cacheblend_rag.diagnostics.timeline import parts_of

    stats, trace = answer.stats, answer.trace
    lines = ["", "time to the first token"]
    for part, seconds in parts_of(stats).items():
        lines.append(f"  {part.replace('_', ' '):<12}{1000 * seconds:>10.1f} ms {seconds / stats.ttft:>6.1%}")
    lines.append(f"  {'in all':<12}{1000 * stats.ttft:>10.1f} ms")
    if trace is None:
        return "\n".join([*lines, "", "recomputed", "  nothing was blended"])
    scores = " to ".join(f"{score:.3g}" for score in trace.score_range)
    matched = stats.reused_tokens + stats.recomputed_tokens
    lines += ["", "recomputed", f"  {stats.recomputed_tokens:,} of {matched:,} matched tokens"]
    lines[-1] += f" ({stats.recomputed_tokens / matched:.1%})" if matched else ""
    lines[-1] += f" by {stats.policy}, scores {scores}" if scores else ""
    for segment in answer.segments:
        chosen = int(((trace.recomputed >= segment.start) & (trace.recomputed < segment.end)).sum())
        where = f"{segment.start:,} to {segment.end - 1:,}"
        lines.append(f"  {chosen:>6,} of {segment.length:,} at {where}, chunk {segment.key[:12]}")
    return "\n".join(lines)


def _seconds(stats: BlendStats) -> str:
    parts = ", ".join(f"{part.replace('_', ' ')} {getattr(stats, part):.3f}" for part in PARTS)
    return f"{stats.ttft:.3f} s ({parts})"


def _near(source: str) -> str:
    """A path as seen from here, if it is below."""
    path, here = Path(source), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
