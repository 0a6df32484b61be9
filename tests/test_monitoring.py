"""The dashboard and the alerts ask for what is exported."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import promql_parser
import pytest
from monitoring import DASHBOARD, EVERYTHING, ROOT, RULES, Samples, exported, panels, queries, rules, selectors, unknown
from prometheus_client import CollectorRegistry, generate_latest

from cacheblend_rag.diagnostics.prometheus import PrometheusMetrics
from cacheblend_rag.guard import GuardReport


class StandIn:
    """What of an engine its metrics ask for."""

    model_name = "m"
    scope = SimpleNamespace(namespace="n")
    guard = SimpleNamespace(report=lambda: GuardReport(compared=9, dropped=1, failed=0, mean_kl=0.2, least_ratio=0.25))


@pytest.mark.parametrize(
    ("module", "needs", "extra"),
    [("prometheus", "prometheus_client", "metrics"), ("spans", "opentelemetry", "tracing")],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, module: str, needs: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, needs, None)
    monkeypatch.delitem(sys.modules, f"cacheblend_rag.diagnostics.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'cacheblend-rag\[{extra}\]'"):
        importlib.import_module(f"cacheblend_rag.diagnostics.{module}")


@pytest.fixture(scope="module")
def known() -> Samples:
    """What an observer of an engine exports."""
    registry = CollectorRegistry()
    engine: Any = StandIn()
    metrics = PrometheusMetrics(engine, registry)
    for stats in EVERYTHING:
        metrics(stats)
    return exported(generate_latest(registry).decode())


def test_queries_ask_for_what_is_exported(known: Samples) -> None:
    asked = {name: unknown(query, known, "cacheblend_") for name, query in queries()}
    assert {name: what for name, what in asked.items() if what} == {}


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("rate(cacheblend_request_total[5m])", ["cacheblend_request_total"]),
        ('cacheblend_requests_total{kind="blend"}', ["cacheblend_requests_total{kind}"]),
        ('cacheblend_requests_total{decision="blended"}', ["decision=blended"]),
        ('cacheblend_prompt_tokens_total{source=~"reused|lost"}', ["source=lost"]),
        ("sum by (tier) (rate(cacheblend_requests_total[5m]))", ["cacheblend_requests_total by tier"]),
        ("cacheblend_load_seconds", ["cacheblend_load_seconds"]),  # of a histogram there are _sum, _count and _bucket
    ],
)
def test_what_is_not_exported_is_noticed(known: Samples, query: str, what: list[str]) -> None:
    assert unknown(query, known, "cacheblend_") == what


def test_nothing_else_is_asked_for() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = {selector.name or "" for _, query in queries() for selector in selectors(promql_parser.parse(query))}
    foreign = {name for name in asked if not name.startswith(("cacheblend_", "vllm:cacheblend_"))}
    assert foreign == recorded


def test_every_metric_is_on_the_dashboard(known: Samples) -> None:
    text = DASHBOARD.read_text("utf-8")
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in known}
    assert [name for name in sorted(families) if name not in text] == []


def test_panels_are_such_as_grafana_imports() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    assert dashboard["id"] is None
    assert dashboard["schemaVersion"] >= 39  # that of Grafana 11
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables.pop("datasource") == "datasource"
    everything = [*panels(), *(panel for panel in dashboard["panels"] if panel["type"] == "row")]
    assert len({panel["id"] for panel in everything}) == len(everything) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["description"] and panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used and used <= variables.keys(), target["expr"]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_alert_is_explained() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    explained = re.findall(r"^\| `(CacheBlend\w+)` \|", (ROOT / "docs" / "alerts.md").read_text("utf-8"), re.MULTILINE)
    assert explained == [alert["alert"] for alert in alerts]
    for alert in alerts:
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert anchor in anchors(ROOT / page), alert["alert"]
        assert alert["annotations"]["summary"]
        assert alert["labels"]["severity"] in ("info", "warning", "critical")


PROMTOOL = shutil.which("promtool")


@pytest.mark.slow
@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: it is in the package prometheus")
@pytest.mark.parametrize("arguments", [["check", "rules", RULES], ["test", "rules", ROOT / "tests" / "alerts.yml"]])
def test_prometheus_agrees(arguments: list[Any]) -> None:
    """Rules are sound, and alerts fire when they should."""
    done = subprocess.run([PROMTOOL or "", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
