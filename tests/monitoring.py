"""The queries of the dashboard and of the alerts, and the names that metrics are exported under."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cacheblend_rag.stats import BlendStats

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "cacheblend.json"
RULES = ROOT / "deploy" / "prometheus" / "cacheblend-alerts.yml"
# What Prometheus itself, or Grafana's choice of a model, puts in.
_FOREIGN_LABELS = {"job", "instance", "le"}
_VARIABLES = {"$__rate_interval": "5m", "$model_name": "m", "$model": "m", "$namespace": "n"}

EVERYTHING = [
    BlendStats(
        100,
        prefix_tokens=10,
        reused_tokens=60,
        recomputed_tokens=10,
        missed_tokens=20,
        decision="blend",
        faults=1,
        match=0.01,
        load=0.1,
        select=0.01,
        recompute=0.2,
        first_token=0.01,
        ttft=0.4,
        read_bytes={"disk": 1000, "memory": 500, "gpu": 100},
        read_seconds={"disk": 0.05, "memory": 0.0, "gpu": 0.0},
        deviation={"mean": 2.0, "p95": 9.0},
    ),
    BlendStats(50, missed_tokens=50, decision="prefill", ttft=0.5),
    BlendStats(50, prefix_tokens=48, missed_tokens=2, decision="prefix", ttft=0.1),
]
"""Stats that leave no metric out."""

Samples = dict[str, dict[str, set[str]]]
"""Values of the labels of samples, by the samples' names."""


def exported(text: str) -> Samples:
    """The samples in a text that Prometheus collects."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def rules() -> list[dict[str, Any]]:
    """Recording rules and alerts."""
    return [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Those of the dashboard that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Everything that Prometheus is asked, by the name of what asks."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in _VARIABLES.items():
                query = query.replace(variable, value)
            yield f"{panel['title']} ({panel['id']})", query


def unknown(query: str, known: Samples, prefix: str) -> list[str]:
    """What a query asks of metrics with a prefix that nobody exports: names, labels, values of labels."""
    found: list[str] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            asked = set(node.modifier.labels) - _FOREIGN_LABELS
            for selector in selectors(node.expr):
                if (selector.name or "").startswith(prefix):
                    found.extend(f"{selector.name} by {label}" for label in asked - known[selector.name].keys())
        if isinstance(node, promql_parser.VectorSelector) and (node.name or "").startswith(prefix):
            labels = known[node.name]
            for matcher in node.matchers.matchers:
                if matcher.name not in labels:
                    found.append(f"{node.name}{{{matcher.name}}}")
                elif matcher.name in ("decision", "source", "tier"):
                    found.extend(
                        f"{matcher.name}={v}" for v in matcher.value.split("|") if v not in labels[matcher.name]
                    )

    names = {selector.name or "" for selector in selectors(promql_parser.parse(query))}
    if missing := sorted(name for name in names if name.startswith(prefix) and name not in known):
        return missing
    promql_parser.walk(promql_parser.parse(query), visit)
    return found


def selectors(expression: promql_parser.Expr) -> list[promql_parser.VectorSelector]:
    """The series that an expression reads."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(expression, visit)
    return found
