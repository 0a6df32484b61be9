"""``cacheblend store ls | verify | rm``."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import plural, print_json, readable_bytes, working
from cacheblend_rag.errors import CacheBlendError

if TYPE_CHECKING:
    from cacheblend_rag.store.base import ChunkInfo
    from cacheblend_rag.store.disk import DiskStore

app = typer.Typer(no_args_is_help=True, help="Look into a chunk store, check it, remove from it.")


@app.command("ls")
def list_chunks(store: options.Store, json: options.Json = False) -> None:
    """List the chunks, most recently used first."""
    with _open(store) as opened:
        entries = list(opened.entries())
    total = sum(entry.nbytes for entry in entries)
    if json:
        print_json({"store": str(store), "bytes": total, "chunks": [_as_json(entry) for entry in entries]})
        return
    if entries:
        typer.echo(f"{'key':32}  {'tokens':>6}  {'size':>10}  {'last used':16}  namespace  model")
    for entry in entries:
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        model = f"{entry.scope.fingerprint.name} ({entry.scope.fingerprint.dtype})"
        size = readable_bytes(entry.nbytes)
        typer.echo(f"{entry.key}  {entry.tokens:6}  {size:>10}  {used}  {entry.scope.namespace:9}  {model}")
    typer.echo(f"{plural(len(entries), 'chunk')}, {readable_bytes(total)}")


@app.command()
def verify(
    store: options.Store,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Move damaged files to quarantine, forget missing ones, list unlisted ones."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Read every chunk and check it against its checksum and the manifest.

    Exits with 1 if something is wrong. Damage never makes an answer wrong: such a chunk is prefilled again.
    """
    with _open(store) as opened, working("reading every chunk"):
        found = list(opened.verify(repair=repair))
    counts = Counter(check.state for check in found)
    bad = [check for check in found if check.state != "ok"]
    if json:
        problems = [{"key": c.key, "path": str(c.path), "state": c.state, "cause": c.cause} for c in bad]
        print_json({"store": str(store), "ok": counts["ok"], "repaired": repair, "problems": problems})
    else:
        for check in bad:
            typer.echo(f"{check.state}: {check.path}: {check.cause}")
        typer.echo(f"{plural(counts['ok'], 'chunk')} sound, {plural(len(bad), 'problem')}{' repaired' * repair}")
    if bad:
        raise typer.Exit(1)


@app.command("rm")
def remove(
    store: options.Store,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="The key, or how it begins.")] = None,
    namespace: Annotated[str | None, typer.Option(metavar="NAME", help="All chunks of a namespace.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All chunks.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    json: options.Json = False,
) -> None:
    """Remove chunks, by KEY, --namespace or --all; the last two also empty the corpus that queries search."""
    if [bool(key), namespace is not None, everything].count(True) != 1:
        raise typer.BadParameter("give one of KEY, --namespace and --all")
    with _open(store) as opened:
        chosen = [
            entry
            for entry in opened.entries()
            if entry.key.startswith(key or "") and namespace in (None, entry.scope.namespace)
        ]
        if key and not chosen:
            raise CacheBlendError(f"no chunk's key begins with {key!r}: cacheblend store ls --store {store} lists them")
        size = sum(entry.nbytes for entry in chosen)
        if not yes:
            typer.confirm(f"Remove {plural(len(chosen), 'chunk')} ({readable_bytes(size)})?", abort=True, err=True)
        removed = opened.remove(prefix=key or "", namespace=namespace)
        if not key:
            from cacheblend_rag.catalog import forget_documents

            forget_documents(store, namespace)
    if json:
        print_json({"store": str(store), "removed": removed, "bytes": size})
    else:
        typer.echo(f"{plural(removed, 'chunk')} removed, {readable_bytes(size)}")


@contextlib.contextmanager
def _open(store: Path) -> Iterator[DiskStore]:
    options.require_store(store)
    from cacheblend_rag.store.disk import DiskStore

    with contextlib.closing(DiskStore(store)) as opened:
        yield opened


def _as_json(entry: ChunkInfo) -> dict[str, Any]:
    model = entry.scope.fingerprint
    return {
        "key": entry.key,
        "namespace": entry.scope.namespace,
        "model": model.name,
        "dtype": model.dtype,
        "tokens": entry.tokens,
        "bytes": entry.nbytes,
        "created": entry.created,
        "last_used": entry.last_used,
    }
