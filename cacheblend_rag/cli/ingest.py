"""``cacheblend ingest``."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import ingest_progress, plural, print_error, print_json, print_note, readable_bytes

if TYPE_CHECKING:
    from cacheblend_rag.ingestion import IngestProgress, IngestReport

_KINDS = ".txt, .md, .html, .htm and .pdf"


def ingest(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help=f"Its {_KINDS} files are ingested, recursively.")],
    model: options.Model,
    store: options.Store,
    engine: options.EngineName = "transformers",
    base_url: options.BaseUrl = None,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a chunk.")] = 256,
    namespace: options.Namespace = "default",
    primer: options.Primer = None,
    codec: options.Codec = "raw",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Prefill a directory's documents once, in chunks, and store their KV.

    Run it again to go on after an interruption, or to follow the directory after it changed. HTML and PDF need the
    extra "documents" of cacheblend-rag.
    """
    from cacheblend_rag.catalog import Catalog
    from cacheblend_rag.ingestion import find_files, ingest

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every oddity of a file that it can read
    find_files(directory)  # a directory that isn't there is told before the model is loaded
    store.mkdir(mode=0o700, parents=True, exist_ok=True)  # with a server, only the catalogue is kept there
    last: IngestProgress | None = None
    try:
        with (
            options.open_engine(
                model,
                store,
                engine=engine,
                base_url=base_url,
                namespace=namespace,
                codec=codec,
                primer=primer,
                dtype=dtype,
                device=device,
            ) as loaded,
            Catalog(store, loaded.scope) as catalog,
            ingest_progress() as show,
        ):

            def progress(at: IngestProgress) -> None:
                nonlocal last
                last = at
                show(at)

            report = ingest(loaded, directory, catalog, chunk_tokens=chunk_tokens, progress=progress)
    except KeyboardInterrupt:
        done = f"{last.files_done} of {last.files} files done" if last else "nothing done yet"
        print_note(f"interrupted: {done}; run the same command to go on")
        raise typer.Exit(130) from None

    if json:
        print_json({"store": str(store), "model": model, "namespace": namespace} | dataclasses.asdict(report))
    else:
        typer.echo(_summary(report, store))
    for bad in report.bad:
        print_error(f"{bad.path}: {bad.reason}")
    if report.bad:
        raise typer.Exit(1)


def _summary(report: IngestReport, store: Path) -> str:
    done = f"{plural(report.files, 'file')} in {store}"
    chunks = f"{plural(report.stored, 'chunk')} stored, {report.already_there:,} already there"
    cost = f"{plural(report.tokens, 'token')} prefilled, {readable_bytes(report.bytes)} written, {report.seconds:.1f} s"
    lines = [f"{done}: {chunks}", cost]
    if report.evicted or report.removed:
        lines.append(
            f"{plural(report.evicted, 'chunk')} evicted of texts that are gone"
            f" ({plural(report.removed, 'file')} removed)"
        )
    return "\n".join(lines)
