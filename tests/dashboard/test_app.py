"""The page over HTTP: what it shows, what it escapes, what it refuses."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from cacheblend_rag.dashboard.app import create_app
from cacheblend_rag.dashboard.log_reader import LogReader
from cacheblend_rag.dashboard.store_view import StoreView
from cacheblend_rag.diagnostics.request_log import MemoryUse

from .conftest import append, blend, prefill, request

PARTS = ("log", "hits", "ttft", "store", "slowest")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


@pytest.fixture
def client(store: Path, log: Path) -> Iterator[TestClient]:
    with TestClient(create_app(StoreView(store), LogReader(log)), base_url="http://127.0.0.1:8765") as client:
        yield client


@pytest.fixture
def shown(client: TestClient) -> Callable[[str], str]:
    """The text of a part, or of the page, as one line."""

    def text(path: str) -> str:
        answer = client.get(path)
        assert answer.status_code == 200, answer.text
        body = re.sub(r"<style>.*</style>", "", answer.text, flags=re.DOTALL)
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())

    return text


def test_figures_are_on_the_page(log: Path, shown: Callable[[str], str]) -> None:
    now = time.time()
    append(
        log,
        blend(1000, 0.5, time=now, reused_tokens=600, recomputed_tokens=150, missed_tokens=250, reason="reuses 600"),
        prefill(1000, 2.0, time=now, missed_tokens=1000, reason="mode is off"),
    )
    assert re.match(r"2 requests, the last one \d s ago", shown("/parts/log"))
    hits = shown("/parts/hits")
    assert "30.0 % of tokens not computed 1 blended 0 exact prefix only 1 prefilled plainly" in hits
    assert "recomputed 7.5 % missed 62.5 %" in hits
    first = shown("/parts/ttft")
    assert "blend, median 500 ms plain prefill of the same prompts, estimated median 2 s" in first
    assert "The estimate is for 1 of 1 blend, at the tokens per second of 1 plain prefill in the log" in first
    assert re.search(
        r"2 s rest 2 s prefill: mode is off .* 500 ms rest 500 ms blend: reuses 600", shown("/parts/slowest")
    )
    whole = shown("/")
    for part in PARTS:
        assert shown(f"/parts/{part}") in whole


def test_without_plain_prefills_nothing_is_estimated(log: Path, shown: Callable[[str], str]) -> None:
    append(log, blend(1000, 0.5), prefill(10, 0.1))
    first = shown("/parts/ttft")
    assert "What plain prefill would have taken is not known" in first
    assert "estimate" not in first


def test_the_store_is_shown_by_tier_model_and_namespace(log: Path, shown: Callable[[str], str]) -> None:
    append(log, request(time.time(), process=41, memory=MemoryUse(2, 3 << 20, 1 << 30), disk_max_bytes=5 << 30))
    text = shown("/parts/store")
    assert re.search(r"disk 3 \S+ KiB 5.0 GiB .* free memory, process 41 2 3.0 MiB 1.0 GiB as of \d+ s ago", text)
    assert re.search(r"b float32 legal 1 200 \S+ KiB \d+ s ago a float32 default 2 70 \S+ KiB \d+ s ago", text)


def test_a_store_that_goes_away_is_told(store: Path, shown: Callable[[str], str]) -> None:
    shutil.rmtree(store)
    assert "can't be used" in shown("/parts/store")
    assert "cacheblend" in shown("/")


def test_a_log_to_come_is_waited_for(log: Path, shown: Callable[[str], str]) -> None:
    assert f"{log} is not there yet: waiting" in shown("/")
    assert "No requests." in shown("/parts/hits")
    append(log, request(time.time()))
    assert "1 request, the last one" in shown("/parts/log")
    log.write_bytes(log.read_bytes() + b"damage\n")
    assert "1 damaged line skipped" in shown("/parts/log")


def test_the_store_alone(store: Path) -> None:
    with TestClient(create_app(StoreView(store), None), base_url="http://localhost") as client:
        page = client.get("/").text
        assert "No request log is shown" in page
        assert 'id="store"' in page and 'id="hits"' not in page
        assert client.get("/parts/hits").status_code == 200


def test_only_requests_of_the_time_asked_for_count(log: Path, client: TestClient, shown: Callable[[str], str]) -> None:
    append(log, *(request(time.time() - 3600 * hours) for hours in (30, 2, 0.1)))
    assert [shown(f"/parts/log{query}").split(" request")[0] for query in ("", "?hours=24", "?hours=1")] == list("321")
    assert 'hx-get="parts/hits?hours=24"' in client.get("/?hours=24").text
    assert [client.get(f"/?hours={hours}").status_code for hours in ("-1", "0", "nan", "x")] == [422] * 4


def test_names_and_reasons_are_shown_as_text(log: Path, client: TestClient, shown: Callable[[str], str]) -> None:
    evil = "\"'><script>alert(1)</script>{{ 7 * 7 }}"
    append(log, blend(1000, 0.5, model=evil, namespace=evil, reason=evil, policy=evil, read_bytes={evil: 5}))
    for path in ("/", *(f"/parts/{part}" for part in PARTS)):
        body = client.get(path).text
        assert "<script>" not in body
        assert "alert(1)</script>" not in body
    assert evil in shown("/parts/slowest")


def test_it_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert not re.search(r"(src|href|hx-get)=\"?(\w+:)?//", page.text)
    scripts = re.findall(r'src="([^"]+)"', page.text)
    assert scripts == ["htmx.js", "dashboard.js"]
    for script in scripts:
        answer = client.get(f"/{script}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/javascript")
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]


def test_it_only_reads(client: TestClient, store: Path) -> None:
    for path in ("/", "/parts/store"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert client.request(method, path).status_code == 405
    assert client.get("/parts/secrets").status_code == 422
    assert client.get("/app.js").status_code == 422
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_pages_from_elsewhere_cant_read_it(store: Path) -> None:
    """A name of theirs may point to 127.0.0.1: the browser then takes the dashboard for theirs."""
    for host, name, expected in [
        ("127.0.0.1", "evil.example:8765", 400),
        ("127.0.0.1", "localhost:9000", 200),  # a forwarded port
        ("::1", "[::1]:8765", 200),
        ("localhost", "evil.example", 400),
        ("0.0.0.0", "dashboard.example", 200),
    ]:
        with TestClient(create_app(StoreView(store), None, host)) as client:
            assert client.get("/", headers={"host": name}).status_code == expected, (host, name)


def test_numbers_of_any_size_are_shown(log: Path, shown: Callable[[str], str]) -> None:
    most = 2**53 - 1
    big = blend(most, 1e15, time=1e15, reused_tokens=most, match=1e15, read_bytes={"disk": most})
    append(log, big, dataclasses.replace(big, time=0.0), prefill(most, 1e-300), prefill(0, 1e-300, reused_tokens=0))
    assert "4 requests" in shown("/")
