"""The page in a real browser."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from cacheblend_rag.dashboard import app as dashboard
from cacheblend_rag.dashboard.log_reader import LogReader
from cacheblend_rag.dashboard.store_view import StoreView

from .browsers import find_browser
from .conftest import append, blend, prefill


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=find_browser())
        except Error as error:
            pytest.skip(f"no browser: playwright install chromium ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


class Server:
    """A dashboard in a thread."""

    def __init__(self, store: Path, log: Path) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        app = dashboard.create_app(StoreView(store), LogReader(log))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()


def test_it_refreshes_itself(browser: Browser, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "REFRESH_SECONDS", 1)
    log = tmp_path / "log"
    server = Server(store, log)
    page = browser.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    try:
        page.goto(server.url)
        expect(page.locator("#log")).to_contain_text("is not there yet")
        expect(page.locator("#store")).to_contain_text("legal")
        append(
            log, blend(1000, 0.5, time=time.time(), reused_tokens=900, missed_tokens=100, reason="<b>reuses 900</b>")
        )
        expect(page.locator("#hits")).to_contain_text("90.0 %")  # without a reload
        expect(page.locator("#slowest")).to_contain_text("<b>reuses 900</b>")
        expect(page.locator("#ttft")).to_contain_text("is not known")
        assert_bars_are_seen(page)
        append(log, prefill(1000, 2.0, time=time.time()))
        expect(page.locator("#ttft")).to_contain_text("estimated median 2 s")
        expect(page.locator("#hits")).to_contain_text(re.compile(r"1\s*prefilled plainly"))
        page.get_by_role("link", name="last hour").click()
        expect(page).to_have_url(f"{server.url}?hours=1")
        expect(page.locator("#log")).to_contain_text("2 requests of the last hour")
        assert wrong == []
        expect(page.get_by_role("alert")).to_be_hidden()
    finally:
        server.stop()
    expect(page.get_by_role("alert")).to_be_visible()  # the figures stay, but not as if they were of now
    expect(page.locator("#hits")).to_contain_text(re.compile(r"1\s*prefilled plainly"))
    page.close()


def assert_bars_are_seen(page: Page) -> None:
    """In colour, and as long as they should be: the policy of the page lets its styles through."""
    script = """() => {
      const bar = document.querySelector("#hits .bar i.reused"), width = (one) => one.getBoundingClientRect().width;
      return [width(bar) / width(bar.parentElement), getComputedStyle(bar).backgroundColor];
    }"""
    share, colour = page.evaluate(script)  # at once: between two calls the part may be fetched again
    assert share == pytest.approx(0.9, abs=0.01)
    assert colour == "rgb(0, 158, 115)"
