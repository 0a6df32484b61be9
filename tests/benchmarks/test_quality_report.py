"""From records to what is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quality_report import bootstrap, closure, panels, read_records, report, sign_test

MODES = [
    {"mode": "full prefill", "primer": "", "policy": "", "budget": 1.0},
    {"mode": "full reuse", "primer": "system", "policy": "", "budget": 0.0},
    {"mode": "hkvd 15%", "primer": "system", "policy": "hkvd", "budget": 0.15},
]
SETTINGS = {
    "model": "m",
    "dtype": "float32",
    "best_last": False,
    "cold": 0.0,
    "max_tokens": 8,
    "corpus_tokens": 10,
    "primer": "system",
}


def mode_record(own: float, gold: float, top1: tuple[int, int] = (2, 3), computed: int = 10) -> dict[str, Any]:
    return {"kl": [own, gold], "top1": list(top1), "computed_tokens": computed, "chosen_by": "hkvd"}


def question(number: int, hkvd: dict[str, Any], reuse: dict[str, Any], **others: dict[str, Any]) -> dict[str, Any]:
    answered = {"answer": "x", "em": number % 2, "f1": 0.5, "rouge_l": 0.25}
    modes = {"full prefill": {**mode_record(0, 0, computed=100), **answered}, "full reuse": reuse, "hkvd 15%": hkvd}
    return {
        "dataset": "some",
        "number": number,
        "prompt_tokens": 100,
        "answer_tokens": [2, 3],
        "modes": {**modes, **others},
    }


def write(path: Path, run: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in [run, *records]))
    return path


def test_closure_is_of_sums() -> None:
    assert closure(np.array([1.0, 1.0]), np.array([1.0, 3.0])) == pytest.approx(0.5)
    assert closure(np.array([[0.0, 0.0], [6.0, 2.0]]), np.array([[1.0, 3.0], [1.0, 3.0]])) == pytest.approx([1, -1])


def test_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=400)
    found = bootstrap(lambda drawn: drawn.mean(axis=-1), values)
    half = 1.645 * values.std() / math.sqrt(400)
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.02)
    assert found == bootstrap(lambda drawn: drawn.mean(axis=-1), values)


def test_bootstrap_draws_whole_questions() -> None:
    """A mode that closes just half of every question closes half of any choice of them."""
    reuse = np.random.default_rng(2).exponential(size=30)
    assert bootstrap(closure, reuse / 2, reuse) == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})


@pytest.mark.parametrize(
    ("wins", "losses", "ties", "p"),
    [(5, 0, 0, 2 / 32), (8, 2, 3, 2 * (1 + 10 + 45) / 1024), (4, 4, 0, 1), (0, 0, 2, 1), (35, 12, 0, 0.0010885)],
)
def test_sign_test(wins: int, losses: int, ties: int, p: float) -> None:
    values = [0.0] * wins + [2.0] * losses + [1.0] * ties
    found = sign_test(values, [1.0] * len(values))
    assert (found["wins"], found["losses"], found["ties"]) == (wins, losses, ties)
    assert found["p"] == pytest.approx(p, rel=1e-3)


def test_the_row_of_a_mode() -> None:
    records = [
        question(0, mode_record(1, 0, (1, 3)), mode_record(2, 2), best=mode_record(0.5, 0, computed=20)),
        question(1, mode_record(2, 2, (2, 1)), mode_record(1, 5), best=mode_record(0.5, 4.5, computed=30)),
    ]
    run = {"modes": [*MODES, {"mode": "best", "primer": "system", "policy": "best", "budget": 0.5}]}
    (dataset,) = report([run], records)["datasets"]
    rows = {row["mode"]: row for row in dataset["rows"]}
    assert list(rows) == ["full prefill", "full reuse", "hkvd 15%", "best"]
    hkvd = rows["hkvd 15%"]
    assert hkvd["closure"]["value"] == pytest.approx(1 - 5 / 10)
    assert hkvd["closure"]["own_answer"] == pytest.approx(1 - 3 / 3)
    assert hkvd["closure"]["gold_answer"] == pytest.approx(1 - 2 / 7)
    assert hkvd["closure"]["median"] == pytest.approx((3 / 4 + 2 / 6) / 2)
    assert hkvd["closure"]["worst_decile"] == pytest.approx(2 / 6 + 0.1 * (3 / 4 - 2 / 6))
    assert hkvd["kl_per_token"]["mean"] == pytest.approx(5 / 10)
    assert hkvd["kl_per_token"]["worst_decile"] == pytest.approx(0.2 + 0.9 * 0.6)
    assert hkvd["top1_agreement"]["value"] == pytest.approx(7 / 10)
    assert hkvd["computed_share"] == pytest.approx(0.1)
    assert hkvd["chosen_by"] == ["hkvd"]
    assert rows["best"]["against_baseline"] == {"wins": 1, "losses": 1, "ties": 0, "p": 1.0}
    assert rows["full prefill"]["em"]["value"] == pytest.approx(0.5)
    assert "em" not in hkvd


def test_runs_share_questions_or_modes(tmp_path: Path) -> None:
    run = {"modes": MODES, "settings": SETTINGS}
    other = {"mode": "none 5%", "primer": "none", "policy": "none", "budget": 0.05}
    first, second = (question(n, mode_record(1, 1), mode_record(2, 2)) for n in (0, 1))
    more = question(0, mode_record(1, 1), mode_record(2, 2), **{"none 5%": mode_record(0, 1)})
    left_out = {"dataset": "some", "number": 2, "left_out": "too long", "modes": {}}
    paths = [
        write(tmp_path / "b.jsonl", run, [second, left_out]),
        write(tmp_path / "a.jsonl", run, [first]),
        write(tmp_path / "c.jsonl", {"modes": [*MODES, other], "settings": SETTINGS | {"primer": "none"}}, [more]),
    ]
    with paths[2].open("a") as file:
        file.write('{"dataset": "some", "num')  # the run was stopped here
    (dataset,) = report(*read_records(paths))["datasets"]
    assert dataset["questions"] == 2
    assert dataset["left_out"] == ["2: too long"]
    assert [row["questions"] for row in dataset["rows"]] == [2, 2, 2, 1]
    assert dataset["rows"][-1]["closure"]["value"] == pytest.approx(0.75)


def test_answers_of_one_run_stay_where_another_has_none(tmp_path: Path) -> None:
    run = {"modes": MODES, "settings": SETTINGS}
    answered = mode_record(1, 1) | {"answer": "x", "em": 1, "f1": 1, "rouge_l": 1}
    with_answer, without = (question(0, hkvd, mode_record(2, 2)) for hkvd in (answered, mode_record(1, 1)))
    paths = [write(tmp_path / "a.jsonl", run, [with_answer]), write(tmp_path / "b.jsonl", run, [without])]
    (dataset,) = report(*read_records(paths))["datasets"]
    assert dataset["rows"][-1]["em"]["value"] == 1


def test_a_question_left_out_in_one_run_is_that_of_another(tmp_path: Path) -> None:
    run = {"modes": MODES, "settings": SETTINGS}
    left_out = {"dataset": "some", "number": 0, "left_out": "too long", "modes": {}}
    measured = question(0, mode_record(1, 1), mode_record(2, 2))
    a, b = write(tmp_path / "a.jsonl", run, [left_out]), write(tmp_path / "b.jsonl", run, [measured])
    for paths in ([a, b], [b, a]):
        (dataset,) = report(*read_records(paths))["datasets"]
        assert (dataset["questions"], dataset["left_out"]) == (1, [])


def test_runs_of_different_models_are_not_merged(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{dtype}.jsonl", {"modes": MODES, "settings": SETTINGS | {"dtype": dtype}}, [])
        for dtype in ("float32", "bfloat16")
    ]
    with pytest.raises(ValueError, match="dtype"):
        read_records(paths)


def test_lines_of_the_picture_begin_with_full_reuse_of_their_primer() -> None:
    primed = [
        {"mode": "full reuse, none primer", "primer": "none", "policy": "", "budget": 0.0},
        {"mode": "hkvd 5%, none primer", "primer": "none", "policy": "hkvd", "budget": 0.05},
        {"mode": "recompute 100%, none primer", "primer": "none", "policy": "", "budget": 1.0},
    ]
    others = {mode["mode"]: mode_record(kl, kl) for mode, kl in zip(primed, (3, 1, 0), strict=True)}
    records = [question(0, mode_record(1, 1), mode_record(2, 2), **others)]
    (panel,) = panels(report([{"modes": [*MODES, *primed]}], records))
    assert panel.title == "some: 1 questions of 100 tokens"
    shown = {name: [(point.budget, point.closure) for point in line] for name, line in panel.lines.items()}
    assert shown == {
        "hkvd": [(0, 0), (0.15, 0.5)],
        "hkvd, none primer": [(0, -0.5), (1, 1), (0.05, 0.5)],
    }


def test_auto_is_compared_with_a_fixed_ratio_of_its_mean_budget() -> None:
    modes = [
        *MODES,
        {"mode": "hkvd 25%", "primer": "system", "policy": "hkvd", "budget": 0.25},
        {"mode": "hybrid 20%", "primer": "system", "policy": "hybrid", "budget": 0.2},
        {"mode": "hkvd auto", "primer": "system", "policy": "hkvd", "budget": "auto"},
    ]

    def records(autos: list[dict[str, Any]]) -> list[dict[str, Any]]:
        other = {"hkvd 25%": mode_record(1, 1), "hybrid 20%": mode_record(0, 0)}
        return [
            question(n, mode_record(2 + n, 2), mode_record(5, 5), **other, **{"hkvd auto": auto})
            for n, auto in enumerate(autos)
        ]

    autos = [mode_record(1, 1) | {"recomputed_share": 0.1}, mode_record(2, 2.5) | {"recomputed_share": 0.3}]
    results = report([{"modes": modes}], records(autos))
    row = results["datasets"][0]["rows"][-1]
    assert row["mean_budget"] == pytest.approx(0.2)
    against = row["against_fixed"]  # between 15% and 25%: (4 + 2) / 2 and (5 + 2) / 2
    assert against["closure"] == pytest.approx(1 - 6.5 / 20)
    assert against["kl_difference"]["value"] == pytest.approx((2 - 3 + 4.5 - 3.5) / 2)
    assert (against["signs"]["wins"], against["signs"]["losses"]) == (1, 1)
    (panel,) = panels(results)
    (point,) = panel.lines["hkvd auto"]
    assert (point.budget, point.closure) == pytest.approx((0.2, 1 - 6.5 / 20))
    assert "against_fixed" not in results["datasets"][0]["rows"][-2]
    assert "mean_budget" not in results["datasets"][0]["rows"][-2]


def test_a_fixed_ratio_can_be_full_reuse_in_part() -> None:
    """A mean budget below the lowest that was measured."""
    modes = [*MODES, {"mode": "hkvd auto", "primer": "system", "policy": "hkvd", "budget": "auto"}]
    auto = {"hkvd auto": mode_record(3, 3) | {"recomputed_share": 0.05}}
    results = report([{"modes": modes}], [question(0, mode_record(1, 1), mode_record(4, 4), **auto)])
    assert results["datasets"][0]["rows"][-1]["against_fixed"]["kl_difference"]["value"] == pytest.approx(0)
