"""The options of commands that load a model, and loading it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacheblend_rag.cli.console import working
from cacheblend_rag.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.engines.base import Engine


def directory(text: str) -> Path:
    """What an option that names a directory holds."""
    if "://" in text:
        raise typer.BadParameter(f"{text} is a URL: give a directory")
    path = Path(text).expanduser()
    if os.path.exists(path) and not os.path.isdir(path):  # unlike Path's, they don't raise what is told later
        raise StoreError(f"{text} is a file: give a directory")
    return path


def _ratio(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor auto") from None


Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Model directory or hub id.")]
Store = Annotated[Path, typer.Option("--store", "-s", metavar="DIR", parser=directory, help="Chunk store.")]
EngineName = Annotated[
    str, typer.Option("--engine", metavar="NAME", help="What runs the model: transformers, vllm, or server.")
]
BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", metavar="URL", help="With --engine server: its API, such as http://localhost:8000/v1."),
]
Namespace = Annotated[str, typer.Option(metavar="NAME", help="Tenant: chunks of different namespaces never meet.")]
Primer = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text that every chunk is prefilled behind, instead of the built-in one; the same for ingest and query.",
    ),
]
Codec = Annotated[
    str, typer.Option(metavar="CODEC", help="How chunk KV is kept: raw, or fp8 (half the bytes of bfloat16).")
]
Ratio = Annotated[
    Any,
    typer.Option(
        "--ratio",
        metavar="RATIO",
        parser=_ratio,
        help="Share of the reused tokens to recompute, from 0 to 1; auto: as many as matter to the answer.",
    ),
]
Dtype = Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16, float16, or auto.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, or auto.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@contextlib.contextmanager
def open_engine(
    model: str,
    store: Path | None,
    *,
    engine: str,
    base_url: str | None,
    namespace: str,
    codec: str,
    primer: Path | None,
    dtype: str,
    device: str,
    blend: BlendConfig | None = None,
) -> Iterator[Engine]:
    """Load a model with a store, showing that it takes a while; closed at the end.

    A server has a store of its own: only the catalogue of texts is kept in ``store`` then. None: a store in memory.
    """
    from cacheblend_rag import BlendConfig, load_engine

    show_no_bars(model)
    if engine == "vllm":  # which logs to stdout otherwise, where results go
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    primer_text = None if primer is None else read_text(primer)
    with working(f"loading {model}"):
        loaded = load_engine(
            model,
            engine=engine,
            store=None if engine == "server" or store is None else str(store),
            blend=blend or (None if engine == "server" else BlendConfig()),
            base_url=base_url,
            dtype=dtype,
            device=device,
            primer=primer_text,
            namespace=namespace,
            codec=codec,
        )
    with loaded:
        yield loaded


def show_no_bars(model: str) -> None:
    """One line about loading is enough, if nothing is to be downloaded. Call it before transformers is imported."""
    if os.path.isdir(model):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def require_store(store: Path) -> None:
    """Refuse to make a store where one is only to be read.

    Raises:
        StoreError: there is no such directory, it is empty, or can't be read.
    """
    from cacheblend_rag.store import is_anything_in

    if not is_anything_in(store):
        raise StoreError(
            f"there is no chunk store at {store}: make one with cacheblend ingest DIR --model MODEL --store {store}"
        )


def read_text(path: Path) -> str:
    """The text of a file, ``-`` being standard input.

    Raises:
        ConfigError: it is not UTF-8.
        OSError: it can't be read.
    """
    try:
        data = typer.get_binary_stream("stdin").read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start})") from error
