"""``cacheblend dashboard`` and ``--request-log`` on the command line."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cacheblend_rag.cli import app
from cacheblend_rag.dashboard.log_reader import LogReader

from .conftest import append, request


def refused(*arguments: object) -> str:
    """Run a command that must end in one line on stderr; the line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_what_it_refuses(tmp_path: Path, store: Path) -> None:
    assert "there is no chunk store at" in refused("dashboard", "--store", tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert "is not a chunk store" in refused("dashboard", "--store", tmp_path / "other", "--port", 0)
    line = refused("dashboard", "--store", store, "--requests", tmp_path)
    assert line.startswith(f"error: {tmp_path} can't be read: it is no regular file: name a request log")
    assert "can't listen at port 0 of 192.0.2.1" in refused(
        "dashboard", "--store", store, "--host", "192.0.2.1", "--port", 0
    )
    assert "can't listen" in refused("dashboard", "--store", store, "--host", "no.such.host.invalid", "--port", 0)


def test_a_port_that_is_taken(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("dashboard", "--store", store, "--port", port)
    assert line == f"error: port {port} of 127.0.0.1 is taken: give another with --port"


@pytest.mark.parametrize("package", ["uvicorn", "fastapi", "jinja2", "django_htmx"])
def test_a_package_that_is_missing(store: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [name for name in sys.modules if name.startswith("cacheblend_rag.dashboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    line = refused("dashboard", "--store", store, "--port", 0)
    assert line.endswith("pip install 'cacheblend-rag[dashboard]'") and package in line


def test_a_log_in_no_directory(tmp_path: Path, store: Path) -> None:
    arguments = ["query", "Who?", "--model", "none", "--store", str(store)]
    result = CliRunner().invoke(app, [*arguments, "--request-log", str(tmp_path / "nowhere" / "log")])
    assert result.exit_code == 2
    message = " ".join(result.stderr.replace("│", " ").split())
    assert "there is no directory" in message and "for --request-log" in message


def test_queries_are_logged(tmp_path: Path, small_smollm2: str) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "arvel.md").write_text("The bridge of Arvel was finished in 1342 by the wardens.\n" * 4)
    (tmp_path / "primer").write_text("A passage.\n\n")
    options = ["--model", small_smollm2, "--store", str(tmp_path / "kv"), "--primer", str(tmp_path / "primer")]
    log = tmp_path / "log"
    query = ["query", "Who finished the bridge?", "--mode", "blend", "--compare", "--max-tokens", "2"]
    for arguments in (["ingest", str(tmp_path / "corpus")], [*query, "--request-log", str(log)]):
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.stderr
    blended, full = LogReader(log).read().requests  # and no warm-up
    assert (blended.stats.decision, full.stats.decision) == ("blend", "prefill")
    assert blended.stats.prompt_tokens == full.stats.prompt_tokens
    assert (blended.model, blended.namespace) == (small_smollm2, "default")
    assert blended.memory is not None and blended.memory.chunks == 1
    assert b"Arvel" not in log.read_bytes() and b"bridge" not in log.read_bytes()


def test_it_serves_until_it_is_interrupted(tmp_path: Path, store: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "cacheblend_rag.cli", "dashboard", "--store", str(store)]
    with subprocess.Popen(
        [*command, "--requests", str(log), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            url, _, rest = process.stdout.readline().partition(" ")
            assert rest == f"shows {store}; Ctrl+C stops it\n"
            append(log, request())
            with urllib.request.urlopen(f"{url}/parts/log", timeout=30) as answer:
                assert b"1 request" in answer.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130)
            assert process.stderr.read() == f"note: {log} is not there yet: waiting for its first request\n"
        finally:
            process.kill()
