"""The page: what is on it is made here, as HTML, and htmx fetches its parts again every few seconds."""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import django_htmx
import jinja2
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cacheblend_rag.cli.console import plural, readable_bytes
from cacheblend_rag.dashboard import figures
from cacheblend_rag.dashboard.log_reader import LogReader, LogView
from cacheblend_rag.dashboard.store_view import DiskUse, StoreView

REFRESH_SECONDS = 3

# Nothing from elsewhere, and no scripts but the two that are served here.
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Part = Literal["log", "hits", "ttft", "store", "slowest"]
Hours = Annotated[float | None, Query(gt=0, le=1e6)]


def create_app(store: StoreView, log: LogReader | None, host: str = "127.0.0.1") -> FastAPI:
    """The dashboard as an ASGI app. All it does is read.

    Args:
        store: What it shows of the store; closed with the app.
        log: Where requests come from; None: only the store is shown.
        host: Where it will be served. On a loopback address only requests for that are answered: a page from elsewhere
            must not read it through a name that it has pointed here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = FastAPI(title="cacheblend", lifespan=lifespan, openapi_url=None)
    environment = _environment()
    whole, parts = environment.get_template("page.html"), environment.get_template("parts.html")
    scripts = {
        "htmx.js": importlib.resources.files(django_htmx).joinpath("static/django_htmx/htmx-2.min.js").read_bytes(),
        "dashboard.js": importlib.resources.files(__package__).joinpath("dashboard.js").read_bytes(),
    }
    if _is_loopback(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])

    @app.middleware("http")
    async def add_headers(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    def context(hours: float | None) -> dict[str, Any]:
        view = LogView() if log is None else log.read()
        since = 0.0 if hours is None else time.time() - 3600 * hours
        return {
            "log_path": None if log is None else log.path,
            "store_path": store.directory,
            "view": view,
            "requests": [request for request in view.requests if request.time >= since],
            "hours": hours,
            "refresh": REFRESH_SECONDS,
            "look": functools.partial(_look, store),
            "now": time.time(),
            "figures": figures,
        }

    @app.get("/", response_class=HTMLResponse)
    def page(hours: Hours = None) -> str:
        return whole.render(context(hours))

    @app.get("/parts/{part}", response_class=HTMLResponse)
    def one_part(part: Part, hours: Hours = None) -> str:
        return str(getattr(parts.make_module(context(hours)), part)())

    @app.get("/{name}.js")
    def script(name: Literal["htmx", "dashboard"]) -> Response:
        return Response(scripts[f"{name}.js"], media_type="text/javascript")

    return app


def _look(store: StoreView) -> tuple[DiskUse | None, str]:
    """What the store holds, or why that can't be said."""
    try:
        return store.use(), ""
    except OSError as error:
        return None, str(error)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": readable_bytes,
        "seconds": _seconds,
        "percent": _percent,
        "moment": _moment,
        "ago": _ago,
        "short": _short,
        "plural": plural,
    }
    return environment


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s" if value < 1000 else f"{value:,.0f} s"


def _percent(share: float) -> str:
    """Nothing that is there is shown as 0 %, and nothing that is missing as all of it."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def _moment(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:,.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _short(model: str) -> str:
    """A hub id as it is; of a path, its end."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model
