"""The benchmark of quality, from questions to report and picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import quality
import torch
from answer_metrics import METRICS
from common import rag_messages

from cacheblend_rag.policies import policy_names


def test_divergence_and_agreement() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2]])
    first = 0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log()
    second = 0.2 * torch.tensor(0.5).log() + 0.8 * torch.tensor(0.8 / 0.6).log()
    assert quality.divergence(p.log(), q.log() + 7) == pytest.approx(float(first + second), abs=1e-6)
    assert quality.divergence(p.log(), p.log()) == pytest.approx(0, abs=1e-12)
    assert quality.agreement(p.log(), q.log()) == 1


def test_modes_of_the_system_primer() -> None:
    modes = quality.compared_modes(["hkvd", "query_aware", "random"], [0.15, 1.0, "auto"], "system")
    assert [mode.mode for mode in modes] == [
        "full reuse",
        "hkvd 15%",
        "hkvd auto",
        "query_aware 15%",
        "query_aware auto",
        "random 15%",
        "recompute 100%",
    ]
    assert modes[0].blend == {"mode": "blend", "recompute_ratio": 0.0}
    assert modes[3].blend == {"mode": "blend", "recompute_ratio": 0.15, "policy": "query_aware"}
    assert modes[4].blend == {"mode": "blend", "recompute_ratio": "auto", "policy": "query_aware"}


def test_another_primer_is_compared_with_that_of_the_system() -> None:
    modes = quality.compared_modes(["query_aware"], [0.05, 1.0], "passage")
    assert [(mode.mode, mode.primer) for mode in modes] == [
        ("full reuse", "system"),
        ("full reuse, passage primer", "passage"),
        ("query_aware 5%, passage primer", "passage"),
        ("recompute 100%, passage primer", "passage"),
        ("hkvd 15%", "system"),
    ]


QUESTIONS = [
    {
        "question": "In which year was the lighthouse on Gannow Isle built?",
        "answer": "1874",
        "context": [
            [
                "Port Harrask",
                [
                    "The ferry leaves at seven.",
                    " In winter there is only the morning boat, and none at all "
                    "when the wind comes from the north, as it does on most days of January.",
                ],
            ],
            [
                "Gannow Isle",
                [
                    "The lighthouse was built in 1874 by Dorothea Flane.",
                    " Its tower of grey stone stands "
                    "ninety steps above the harbour and is painted white every third spring.",
                ],
            ],
            [
                "Salt Festival",
                [
                    "It takes place in August.",
                    " A mayor is weighed against sacks of salt, and the salt is "
                    "given to the poor on the same evening, before a supper of smoked eel.",
                ],
            ],
        ],
    },
    {
        "question": "What is eaten after the mayor has been weighed against salt?",
        "answers": ["smoked eel", "eel"],
        "ctxs": [
            {
                "title": "",
                "text": "The ferry leaves at seven in the morning and again at four in the afternoon, and in "
                "winter there is only the morning boat, which the schoolchildren and the postman take.",
            },
            {
                "title": "Salt Festival",
                "text": "A mayor is weighed against sacks of salt, the salt is given to the poor, "
                "and the evening ends with lanterns along the quay and a supper of smoked eel.",
            },
        ],
    },
    {"question": "What is left out?", "answer": "this", "context": [["Long", ["word " * 9000]], ["Short", ["x"]]]},
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, arguments)])
    assert quality.main() == 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "tales.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    (dataset,) = json.loads(path.read_text())["datasets"]
    return {row["mode"]: row for row in dataset["rows"]}


def test_a_run_and_its_merge(
    small_smollm2: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", small_smollm2, "--dtype", "float32", "--device", "cpu", "--data", data, "--max-tokens", 3]
    paths = {name: tmp_path / "results" / name for name in ("a.jsonl", "a.json", "b.jsonl", "b.json", "plot.svg")}
    budgets = ["--policies", "query_aware", "--budgets", "0.5,auto,1"]
    run(monkeypatch, *common, *budgets, "--answers", "--records", paths["a.jsonl"], "--json", paths["a.json"])
    shown = capsys.readouterr()
    assert "3/3: tales 2: " in shown.err
    assert "tales: 2 questions" in shown.out

    rows = rows_of(paths["a.json"])
    assert list(rows) == [
        "full prefill",
        "full prefill in pieces",
        "full reuse",
        "query_aware 50%",
        "query_aware auto",
        "recompute 100%",
        "hkvd 15%",
    ]
    assert 0.04 < rows["query_aware auto"]["mean_budget"] <= rows["query_aware 50%"]["mean_budget"] <= 0.5
    assert "query_aware auto against a fixed ratio of 0." in shown.out
    assert 0 < rows["full prefill in pieces"]["kl_per_token"]["mean"] < 1e-7  # in float32
    assert rows["full reuse"]["closure"]["value"] == 0
    assert rows["full reuse"]["kl_per_token"]["mean"] > 1e-3
    assert 0 < rows["query_aware 50%"]["closure"]["value"] < 1
    assert rows["query_aware 50%"]["computed_share"] < rows["recompute 100%"]["computed_share"] < 1
    assert rows["recompute 100%"]["kl_per_token"]["mean"] < 1e-7
    assert rows["recompute 100%"]["top1_agreement"]["value"] == 1
    for metric in METRICS:  # the same KV gives the same answer
        assert rows["recompute 100%"][metric] == rows["full prefill"][metric]
    report = json.loads(paths["a.json"].read_text())
    assert report["datasets"][0]["left_out"][0].startswith("2: ")
    assert report["runs"][0]["machine"]["torch"] == torch.__version__
    assert report["runs"][0]["command"].startswith("python benchmarks/quality.py --model ")

    primer = ["--primer", "none", "--policies", "query_aware", "--budgets", "0.5", "--offset", 1, "--questions", 1]
    run(monkeypatch, *common, *primer, "--records", paths["b.jsonl"])
    run(
        monkeypatch,
        "--merge",
        paths["b.jsonl"],
        paths["a.jsonl"],
        "--json",
        paths["b.json"],
        "--plot",
        paths["plot.svg"],
    )
    merged = rows_of(paths["b.json"])
    assert merged["query_aware 50%, none primer"]["questions"] == 1
    assert merged["query_aware 50%, none primer"]["kl_per_token"] != rows["query_aware 50%"]["kl_per_token"]
    assert merged["query_aware 50%"] == rows["query_aware 50%"]
    assert "query_aware, none primer" in paths["plot.svg"].read_text()


def test_chunks_are_read_behind_a_text_of_ones_own(
    small_smollm2: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "a.json", tmp_path / "behind.txt"
    closed = []
    for words in ("A text. ", "Quite another text, and longer. "):
        text.write_text(words * 20)
        arguments = ["--data", data, "--questions", 1, "--policies", "query_aware", "--budgets", "0.5", "--json", path]
        run(
            monkeypatch, "--model", small_smollm2, "--dtype", "float32", "--device", "cpu", *arguments,
            "--primer-file", text, "--max-tokens", 2,
        )  # fmt: skip
        closed.append(rows_of(path)["query_aware 50%, behind.txt primer"]["closure"]["value"])
    assert closed[0] != closed[1]


def test_cold_passages(small_smollm2: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for cold in ("0", "0.5"):
        path = tmp_path / f"{cold}.json"
        arguments = ["--data", data, "--questions", 1, "--policies", "reads_cold", "--budgets", "0.5", "--cold", cold]
        run(
            monkeypatch, "--model", small_smollm2, "--dtype", "float32", "--device", "cpu", *arguments, "--json", path,
            "--max-tokens", 2,
        )  # fmt: skip
        shares.append(rows_of(path)["full reuse"]["computed_share"])
    assert shares[0] < 0.7 * shares[1] < 0.7


@pytest.mark.slow
def test_a_run_on_the_example_corpus(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    arguments = ["--questions", 2, "--corpus-tokens", 600, "--max-tokens", 4, "--budgets", "0.15,1", "--json", path]
    run(monkeypatch, "--model", smollm2, "--dtype", "float32", "--device", "cpu", *arguments)
    rows = rows_of(path)
    assert rows["recompute 100%"]["kl_per_token"]["mean"] < 1e-7
    for policy in policy_names():
        assert rows[f"{policy} 15%"]["questions"] == 2
        assert rows[f"{policy} 15%"]["computed_share"] < 0.3


def test_what_is_not_blended_is_left_out(
    small_smollm2: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mode that was served by plain prefill would look perfect."""
    monkeypatch.setattr(quality, "rag_messages", lambda passages, text: rag_messages(["no passage"], text))
    path = tmp_path / "report.json"
    arguments = ["--data", data, "--questions", 1, "--budgets", "0.5", "--json", path]
    run(monkeypatch, "--model", small_smollm2, "--dtype", "float32", "--device", "cpu", *arguments)
    (dataset,) = json.loads(path.read_text())["datasets"]
    assert dataset["left_out"] == ["0: full reuse: only an exact prefix is known, 0 faults"]
    assert dataset["rows"] == []


@pytest.mark.parametrize("cold", ["1", "-0.1"])
def test_bad_shares_are_refused(cold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", "any", "--cold", cold)


@pytest.mark.parametrize("budgets", ["0,0.15", "1.5", "half"])
def test_bad_budgets_are_refused(budgets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", "--model", "m", "--budgets", budgets])
    with pytest.raises(SystemExit):
        quality.main()


def test_policies_that_there_are_not_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when the first question has been measured in half of the modes."""
    monkeypatch.setattr(sys, "argv", ["quality.py", "--model", "m", "--policies", f"{policy_names()[0]},other"])
    with pytest.raises(SystemExit):
        quality.main()
