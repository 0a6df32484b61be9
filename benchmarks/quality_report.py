"""From what was measured of each question to what is reported of each mode.

A records file is JSON lines. The first is a run: its command, machine, settings, and the modes it compares. Every other
is a question (:func:`benchmarks.quality.measure` makes it). Files of several runs are merged question by question, so
that runs may share the questions among them, or the modes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from answer_metrics import METRICS

from cacheblend_rag.diagnostics.quality_plot import QualityPanel, QualityPoint

FULL_PREFILL, IN_PIECES, FULL_REUSE, BASELINE = "full prefill", "full prefill in pieces", "full reuse", "hkvd 15%"
AUTO = "auto"  # a budget

Record = dict[str, Any]

_COMMON = ("model", "dtype", "best_last", "cold", "max_tokens", "corpus_tokens")  # settings that merged runs must share
_RESAMPLES = 2000
_CONFIDENCE = 0.90


def closure(kl: np.ndarray, reuse_kl: np.ndarray) -> np.ndarray:
    """Share of the gap between full reuse and full prefill that a mode closes.

    Args:
        kl: ``[..., questions]``: KL of the mode's distributions from full prefill's, summed over answer tokens.
        reuse_kl: The same of full reuse.
    """
    return 1 - kl.sum(axis=-1) / reuse_kl.sum(axis=-1)


def bootstrap(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> dict[str, float]:
    """A statistic and its interval, by drawing questions with replacement.

    Args:
        statistic: Of columns ``[..., questions]``, over their last axis.
        columns: Each ``[questions]``.
    """
    questions = len(columns[0])
    drawn = np.random.default_rng(0).integers(questions, size=(_RESAMPLES, questions))
    values = statistic(*(column[drawn] for column in columns))
    low, high = np.quantile(values, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return {"value": float(statistic(*columns)), "low": float(low), "high": float(high)}


def sign_test(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Whether values are lower than a baseline's: exact, paired, two-sided; ties count for neither."""
    wins = sum(a < b for a, b in zip(values, baseline, strict=True))
    losses = sum(a > b for a, b in zip(values, baseline, strict=True))
    decided = wins + losses
    tail = sum(math.comb(decided, n) for n in range(min(wins, losses) + 1))
    p = min(1.0, 2 * tail / 2**decided)
    return {"wins": wins, "losses": losses, "ties": len(values) - decided, "p": p}


def read_records(paths: Sequence[Path]) -> tuple[list[Record], list[Record]]:
    """The runs of some records files, and their questions merged. A last line that was cut short is left out."""
    runs: list[Record] = []
    questions: dict[tuple[str, int], Record] = {}
    for path in paths:
        *lines, _ = path.read_text("utf-8").split("\n")
        run, *records = map(json.loads, lines)
        runs.append(run)
        for record in records:
            known = questions.setdefault((record["dataset"], record["number"]), record)
            if not known["modes"]:  # left out there
                questions[record["dataset"], record["number"]] = record
            for mode, measured in record["modes"].items():
                known["modes"][mode] = known["modes"].get(mode, {}) | measured
    for run in runs:
        if any(run["settings"][name] != runs[0]["settings"][name] for name in _COMMON):
            raise ValueError(f"these runs don't belong together: they differ in one of {', '.join(_COMMON)}")
    return runs, [questions[key] for key in sorted(questions)]


def report(runs: list[Record], questions: list[Record]) -> Record:
    """What is published: every mode of every data set."""
    modes = {mode["mode"]: mode for run in runs for mode in run["modes"]}
    datasets = dict.fromkeys(record["dataset"] for record in questions)
    return {
        "runs": [{name: value for name, value in run.items() if name != "modes"} for run in runs],
        "datasets": [
            _of_dataset(dataset, modes, [record for record in questions if record["dataset"] == dataset])
            for dataset in datasets
        ],
    }


def panels(results: Record) -> list[QualityPanel]:
    """Closure against budget for the picture of a report: from full reuse over the budgets of a policy to all.

    What a policy does with the budget ``auto`` is a point by itself, at what was recomputed on average.
    """
    made = []
    for dataset in results["datasets"]:
        lines: dict[str, list[QualityPoint]] = {}
        for row in dataset["rows"]:
            if not row["policy"]:
                continue
            label = row["policy"] if row["primer"] == "system" else f"{row['policy']}, {row['primer']} primer"
            if row["budget"] == AUTO:
                lines[f"{label} auto"] = [_point({**row, "budget": row["mean_budget"]})]
                continue
            if label not in lines:
                ends = [one for one in dataset["rows"] if one["primer"] == row["primer"] and not one["policy"]]
                lines[label] = [_point(one) for one in ends]
            lines[label].append(_point(row))
        title = f"{dataset['dataset']}: {dataset['questions']} questions of {dataset['prompt_tokens']:.0f} tokens"
        made.append(QualityPanel(title, lines))
    return made


def _point(row: Record) -> QualityPoint:
    closed = row["closure"]
    return QualityPoint(row["budget"], closed["value"], closed["low"], closed["high"])


def _of_dataset(dataset: str, modes: dict[str, Record], records: list[Record]) -> Record:
    measured = [record for record in records if record["modes"]]
    rows = []
    for name, mode in modes.items():
        having = [record for record in measured if name in record["modes"]]
        if having:
            rows.append({**mode, **_of_mode(name, having)})
            if mode["budget"] == AUTO:
                rows[-1] |= {"against_fixed": _against_fixed(mode, list(modes.values()), having)}
    return {
        "dataset": dataset,
        "questions": len(measured),
        "left_out": [f"{record['number']}: {record['left_out']}" for record in records if not record["modes"]],
        "prompt_tokens": float(np.median([record["prompt_tokens"] for record in measured])) if measured else 0.0,
        "rows": rows,
    }


def _of_mode(name: str, records: list[Record]) -> Record:
    """What is reported of a mode, over the questions that have it."""

    def column(mode: str, field: str) -> np.ndarray:
        """``[questions]``, or for what is measured on both answers ``[questions, 2]``: full prefill's own, and gold."""
        return np.array([record["modes"][mode][field] for record in records], dtype=float)

    kl, reuse_kl, baseline_kl = (column(mode, "kl") for mode in (name, FULL_REUSE, BASELINE))
    tokens = np.array([record["answer_tokens"] for record in records], dtype=float).sum(axis=1)
    of_questions = kl.sum(axis=1), reuse_kl.sum(axis=1)
    closures = 1 - of_questions[0] / of_questions[1]
    kl_per_token = of_questions[0] / tokens
    row: Record = {
        "questions": len(records),
        "chosen_by": sorted({record["modes"][name]["chosen_by"] for record in records}),
        "computed_share": float(np.median(column(name, "computed_tokens") / column(FULL_PREFILL, "computed_tokens"))),
        "closure": bootstrap(closure, *of_questions)
        | {
            "own_answer": float(closure(kl[:, 0], reuse_kl[:, 0])),
            "gold_answer": float(closure(kl[:, 1], reuse_kl[:, 1])),
            "median": float(np.median(closures)),
            "worst_decile": float(np.quantile(closures, 0.1)),
        },
        "kl_per_token": {
            "mean": float(of_questions[0].sum() / tokens.sum()),
            "median": float(np.median(kl_per_token)),
            "worst_decile": float(np.quantile(kl_per_token, 0.9)),
        },
        "top1_agreement": bootstrap(
            lambda agreeing, of: agreeing.sum(axis=-1) / of.sum(axis=-1), column(name, "top1").sum(axis=1), tokens
        ),
        "against_baseline": sign_test(of_questions[0].tolist(), baseline_kl.sum(axis=1).tolist()),
    }
    if all("recomputed_share" in record["modes"][name] for record in records):  # older records lack it
        row["mean_budget"] = float(column(name, "recomputed_share").mean())
    if all("answer" in record["modes"][name] for record in records):
        row |= {metric: bootstrap(lambda values: values.mean(axis=-1), column(name, metric)) for metric in METRICS}
    return row


def _against_fixed(auto: Record, modes: list[Record], records: list[Record]) -> Record:
    """A budget of ``auto`` compared with a fixed ratio that recomputes as much on average, by the same policy.

    What the fixed ratio would give is interpolated linearly, question by question, between the fixed budgets that all
    the questions were measured with, full reuse and recomputing all included. KL falls steeply at first, so that the
    line between two budgets is above it: measure a fixed budget near the mean one.

    Returns:
        ``closure`` of the fixed ratio, ``kl_difference`` (auto minus fixed, mean over the questions) and ``signs``.
    """
    fixed = {
        float(mode["budget"]): mode["mode"]
        for mode in modes
        if mode["primer"] == auto["primer"] and mode["policy"] in ("", auto["policy"]) and mode["budget"] != AUTO
        if all(mode["mode"] in record["modes"] for record in records)
    }
    budgets = sorted(fixed)
    mean_budget = np.mean([record["modes"][auto["mode"]]["recomputed_share"] for record in records])

    def kl(mode: str) -> np.ndarray:
        return np.array([sum(record["modes"][mode]["kl"]) for record in records])

    curves = np.stack([kl(fixed[budget]) for budget in budgets], axis=1)
    of_fixed = np.array([np.interp(mean_budget, budgets, curve) for curve in curves])
    of_auto = kl(auto["mode"])
    return {
        "closure": float(closure(of_fixed, kl(FULL_REUSE))),
        "kl_difference": bootstrap(lambda values: values.mean(axis=-1), of_auto - of_fixed),
        "signs": sign_test(of_auto.tolist(), of_fixed.tolist()),
    }
