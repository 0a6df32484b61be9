"""What the doctor concludes from figures, and what it says where there is nothing to measure."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cacheblend_rag import BlendConfig
from cacheblend_rag.cli import app
from cacheblend_rag.diagnostics.checks import Check
from cacheblend_rag.diagnostics.doctor import judge, verdict
from cacheblend_rag.diagnostics.sweep import SettingFigures, SweepResult, settings_to_try
from cacheblend_rag.stats import BlendStats

READ = BlendStats(
    2000, 0, 1500, 300, 200, segments=5, decision="blend", policy="query_aware", load=0.1, select=0.1, recompute=0.2,
    ttft=0.45,
)  # fmt: skip


def figures(kl: float, share: float, ratio: float = 0.15, **read: Any) -> SettingFigures:
    stats = [dataclasses.replace(READ, **read)] * 2
    blend = {"policy": "query_aware", "recompute_ratio": ratio}
    return SettingFigures(blend, [kl, kl], [0.9, 0.9], [share, share], [1.0, 1.0], stats)


def failing(*settings: SettingFigures) -> dict[str, str]:
    """The checks that fail, and their advice."""
    checks = judge(SweepResult(list(settings), []), most_kl=0.1)
    assert all(check.advice for check in checks if not check.ok)
    assert not any(check.advice for check in checks if check.ok)
    return {check.name: check.advice for check in checks if not check.ok}


def test_all_is_well() -> None:
    assert failing(figures(0.05, 0.4)) == {}


def test_the_soonest_setting_that_is_near_enough_is_named() -> None:
    others = [figures(0.09, 0.6, 0.3), figures(0.02, 0.9, 0.5), figures(0.3, 0.2, 0.05)]
    assert failing(figures(0.2, 0.4), *others) == {
        "answers are near full prefill's": "the soonest that is near enough: query_aware 30%"
    }
    assert "no setting tried is near enough" in failing(figures(0.2, 0.4))["answers are near full prefill's"]


@pytest.mark.parametrize(
    ("read", "advice"),
    [
        ({"prompt_tokens": 600}, "prompts under 1,000 tokens gain little"),
        ({"load": 0.3}, "loading takes 67%: keep chunks in memory"),
        ({"recompute": 0.3}, "recomputing takes 67%: lower recompute_ratio"),
        ({"select": 0.15, "recompute": 0.1}, "select takes 33%: this model is too quick"),
    ],
)
def test_why_the_first_token_is_late(read: dict[str, Any], advice: str) -> None:
    (told,) = failing(figures(0.05, 1.2, **read)).values()
    assert told.startswith(advice)


def test_what_is_wrong_with_prompts() -> None:
    assert list(failing(figures(0.05, 0.4, policy="hkvd"))) == ["the question is found"]
    unknown = figures(0.0, 0.9, segments=0)
    assert list(failing(unknown)) == ["known chunks are in the prompts"]
    assert SweepResult([unknown], []).cheapest(0.1) is None  # as near as can be, and nothing to recommend
    assert failing(figures(0.05, 0.4, policy="")) == {}  # there was nothing to choose


def test_a_verdict_names_what_fails_first() -> None:
    fine, bad = Check("one", True, "1"), Check("two", False, "2", "do this")
    assert verdict([fine, fine], None) == "all 2 checks are fine"
    assert verdict([fine, bad, bad], None) == "2 of 3 checks failed: two: do this"
    assert verdict([fine], figures(0.05, 0.4)) == "all 1 checks are fine; soonest and near enough: query_aware 15%"


def test_what_is_tried() -> None:
    tried = settings_to_try(BlendConfig(), 30)
    assert tried[0] == {"policy": "query_aware", "recompute_ratio": 0.15}
    assert len({str(one) for one in tried}) == len(tried)
    assert [one["check_layers"] for one in tried if "check_layers" in one] == [(0,), (2,)]
    assert {one["recompute_ratio"] for one in tried} == {0.05, 0.15, 0.25, 0.5}
    few = settings_to_try(BlendConfig(policy="hkvd", recompute_ratio="auto"), 2)
    assert few[0] == {"policy": "hkvd", "recompute_ratio": "auto"}
    assert SettingFigures(few[0]).name == "hkvd auto"
    assert [one["check_layers"] for one in few if "check_layers" in one] == [(0,)]


# Servers that can't be examined


class Bare(BaseHTTPRequestHandler):
    """As much of vLLM's API as a server without the connector is asked for."""

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        card = {"id": "m", "object": "model", "created": 0, "owned_by": "us"}
        self._send({"object": "list", "data": [card]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send({"choices": [], "kv_transfer_params": None})

    def _send(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def bare() -> Iterator[str]:
    """Base URL of such a server; there is none when the test ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Bare) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def examined(*arguments: object) -> Result:
    told = ("doctor", "--engine", "server", *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in told])


def test_a_server_without_the_connector(bare: str) -> None:
    result = examined("--model", "m", "--base-url", bare, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [(check["name"], check["ok"]) for check in found["checks"]] == [("versions", True), ("model", False)]
    assert found["checks"][1]["figure"].startswith("the engine answers without CacheBlend: start it with the connector")
    assert found["checks"][1]["advice"].startswith("start it with cacheblend serve")
    assert (found["settings"], found["answers"], found["kl_is_lower_bound"]) == ([], [], False)
    assert found["verdict"].startswith("1 of 2 checks failed: model: ")


def test_no_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        result = examined("--model", "m", "--base-url", f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert result.exit_code == 1
    assert "1 of 2 checks failed: server: start it, or give the --base-url that it has" in result.stdout
    assert not result.stderr


def test_what_is_the_servers_to_set(bare: str, tmp_path: Path) -> None:
    for arguments, said in (
        (("--base-url", bare, "--dtype", "float32"), "dtype is the server's to set"),
        (("--base-url", bare, "--codec", "fp8"), "codec is the server's to set"),
        ((), 'engine "server" needs base_url'),
        (("--base-url", bare, "--ratio", 2), "recompute_ratio must be a number in [0, 1]"),
        (("--base-url", bare, "--policy", "best"), "best"),
        (("--base-url", bare, "--prompts", tmp_path / "none.jsonl"), "none.jsonl"),
    ):
        result = examined("--model", "m", *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and said in line
    result = examined("--model", "other", "--base-url", bare)
    assert result.stderr.splitlines() == [f"error: the server at {bare} serves m, not 'other'"]


def test_a_bound_of_the_divergence_is_called_one() -> None:
    (near,) = [
        check
        for check in judge(SweepResult([figures(0.2, 0.4)], [], kl_is_bound=True), most_kl=0.1)
        if check.name == "answers are near full prefill's"
    ]
    assert near.figure.startswith("KL at least 0.200 nats a token")
