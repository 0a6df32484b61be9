"""``cacheblend dashboard``."""

from __future__ import annotations

import contextlib
import errno
import socket
from pathlib import Path
from typing import Annotated

import typer

from cacheblend_rag.cli import engine as options
from cacheblend_rag.cli.console import print_note
from cacheblend_rag.errors import ConfigError


def dashboard(
    store: options.Store,
    requests: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A request log; it need not be there yet. Without it, the store is shown."),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen. Whoever reaches it can read the page.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")] = 8765,
) -> None:
    """Show hits, times to first token, the store and the slowest requests, as a web page that refreshes itself."""
    options.require_store(store)
    try:
        import uvicorn

        from cacheblend_rag.dashboard.app import create_app
    except ImportError as error:
        raise ConfigError(
            f"the dashboard needs packages that are missing ({error}): pip install 'cacheblend-rag[dashboard]'"
        ) from error
    from cacheblend_rag.dashboard.log_reader import LogReader
    from cacheblend_rag.dashboard.store_view import StoreView

    log = None if requests is None else LogReader(requests)
    if log is not None and (problem := log.read().problem):
        if requests is not None and requests.exists():
            raise ConfigError(f"{problem}: name a request log, as cacheblend query --request-log writes it")
        print_note(f"note: {problem}")
    with contextlib.closing(_listen(host, port)) as listener:
        app = create_app(StoreView(store), log, host)
        address = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{address}:{listener.getsockname()[1]} shows {store}; Ctrl+C stops it")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Listen before anything is served: a port that is taken is one line.

    Raises:
        ConfigError: nobody can listen there.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is taken: give another with --port") from error
        raise ConfigError(f"can't listen at port {port} of {host}: {error.strerror or error}") from error
