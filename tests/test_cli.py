"""The ``cacheblend`` command: what it does, what it prints where, and how it fails."""

from __future__ import annotations

import errno
import json
import logging
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pdfs import pdf
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

import cacheblend_rag
from cacheblend_rag import profiling_data
from cacheblend_rag.chunks import ChunkKV
from cacheblend_rag.cli import app
from cacheblend_rag.diagnostics import comparing, embedded, sweep
from cacheblend_rag.diagnostics.embedded import Embedded
from cacheblend_rag.diagnostics.sweep import settings_to_try
from cacheblend_rag.store import MemoryStore

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOWNS = {
    "arvel": "The bridge of Arvel was finished in 1342 by the wardens. It carries trams and motor traffic.",
    "bessel": "The mayor of Bessel is Dessa Pallimore, a former harbour pilot. She was elected in 2019.",
    "corvy": "Corvy lives from its salt pans. The salt company employs nine hundred people in winter.",
}


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars_of_transformers() -> None:
    """As in a process of ours, where that is settled before transformers is imported."""
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def models(make_model: Callable[..., str]) -> list[str]:
    """Two models with chat templates. Their tokens are bytes."""
    settings = {"model_type": "llama", "max_position_embeddings": 4096}
    made = [make_model("one", **settings), make_model("two", **settings, intermediate_size=96)]
    for directory in made:
        Path(directory, "chat_template.jinja").write_text(CHAT)
    return made


@pytest.fixture(scope="session")
def primer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short one, to save time."""
    path = tmp_path_factory.mktemp("primer") / "primer.txt"
    path.write_text("A passage.\n\n")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name, text in TOWNS.items():
        (directory / f"{name}.md").write_text(f"# {name.title()}\n\n{text}\n")
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def options(models: list[str], store: Path, primer: Path) -> list[str]:
    return ["--model", models[0], "--store", str(store), "--primer", str(primer)]


@pytest.fixture
def ingested(corpus: Path, options: list[str]) -> None:
    done("ingest", corpus, *options, "--chunk-tokens", 80)


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def done(*arguments: object, stdin: str | None = None) -> str:
    """Run a command that must succeed; its stdout."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def document(*arguments: object) -> Any:
    """Run a command with --json that must succeed; what it printed, which is one document and nothing else."""
    return json.loads(done(*arguments, "--json"))


def refused(*arguments: object, code: int = 1, stdin: str | bytes | None = None) -> str:
    """Run a command that must end in one line on stderr and nothing on stdout; the line without ``error: ``."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("loading ")]  # where that is slow
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")


def chunk_files(store: Path) -> list[Path]:
    return sorted(store.glob("chunks/*/*.safetensors"))


# The command itself


def test_version() -> None:
    assert done("--version").split() == ["cacheblend", cacheblend_rag.__version__]


def test_every_command_has_help() -> None:
    for command in (
        ["ingest"],
        ["query"],
        ["profile"],
        ["store"],
        ["store", "ls"],
        ["store", "verify"],
        ["store", "rm"],
    ):
        assert "Usage" in done(*command, "--help")


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    program = (
        "import sys\nfrom cacheblend_rag.cli import main\nsys.argv = ['cacheblend', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'semantic_text_splitter'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["--nonsense"],
        ["ingest", "dir"],
        ["ingest", "dir", "--model", "m", "--store", "s", "--chunk-tokens", "0"],
        ["query", "why", "--model", "m", "--store", "s", "--top-k", "0"],
        ["query", "why", "--model", "m", "--store", "s", "--ratio", "much"],
        ["query", "--model", "m", "--store", "s"],
        ["profile", "m"],
        ["profile", "m", "--store", "s", "--ratio", "1"],
        ["profile", "m", "--store", "s", "--questions", "0"],
        ["query", "why", "--model", "m", "--store", "s", "--prompt-file", "f"],
        ["query", "why", "--model", "m", "--store", "s3://bucket/path"],
        ["store", "ls"],
        ["store", "rm", "--store", "s"],
        ["store", "rm", "--store", "s", "--all", "--namespace", "n"],
        ["store", "rm", "ab", "--store", "s", "--all"],
    ],
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("place", [0, 2, 4])
def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path, place: int) -> None:
    arguments = ["store", "ls", "--store", str(tmp_path / "nowhere")]
    ran = subprocess.run(
        [sys.executable, "-m", "cacheblend_rag.cli", *arguments[:place], "--debug", *arguments[place:]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr and "StoreError: there is no chunk store" in ran.stderr


# Ingest


def test_ingest_reports_what_it_did(corpus: Path, options: list[str], store: Path) -> None:
    first = document("ingest", corpus, *options, "--chunk-tokens", 80)
    assert first["files"] == 3
    assert first["stored"] == len(chunk_files(store)) > 3
    assert first["bytes"] == sum(path.stat().st_size for path in chunk_files(store))
    assert first["bad"] == []
    second = document("ingest", corpus, *options, "--chunk-tokens", 80)
    assert (second["stored"], second["already_there"]) == (0, first["stored"])


def test_ingest_for_people(corpus: Path, options: list[str], store: Path) -> None:
    text = done("ingest", corpus, *options, "--chunk-tokens", 80)
    assert f"3 files in {store}: {len(chunk_files(store))} chunks stored, 0 already there" in text
    (corpus / "arvel.md").unlink()
    assert "evicted of texts that are gone (1 file removed)" in done("ingest", corpus, *options, "--chunk-tokens", 80)


def test_ingest_names_bad_files_and_goes_on(corpus: Path, options: list[str]) -> None:
    (corpus / "bad.txt").write_bytes(b"\x00\x01")
    (corpus / "worse.md").write_bytes(b"ab\xff")
    result = run("ingest", corpus, *options, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["files"] == 3 and report["stored"] > 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {corpus}/bad.txt: not text but binary (it holds zero bytes)",
        f"error: {corpus}/worse.md: not UTF-8 text (byte 0xff at 2): convert it",
    ]
    assert [bad["path"] for bad in report["bad"]] == [f"{corpus}/bad.txt", f"{corpus}/worse.md"]


def test_ingest_reads_html_and_pdf_without_noise(corpus, options, caplog, recwarn) -> None:
    logging.getLogger("pypdf").setLevel(logging.NOTSET)
    (corpus / "page.html").write_text("<?xml version='1.0'?><page><p>Fendle has a lido.</p></page>")
    (corpus / "odd.pdf").write_bytes(b"odd" + pdf("Gorse has a mint."))  # pypdf warns of a header out of place
    (corpus / "scan.pdf").write_bytes(pdf(""))
    result = run("ingest", corpus, *options)
    assert result.exit_code == 1
    assert result.stdout.startswith("5 files in ")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {corpus}/scan.pdf: a PDF without text (scanned?): run OCR over it first (ocrmypdf)"]
    assert [record for record in caplog.records if record.name.startswith("pypdf")] == []
    assert [str(warning.message) for warning in recwarn if "XML" in str(warning.message)] == []
    passages = document("query", "Who has a mint?", *options, "--max-tokens", 1)["passages"]
    assert (passages[0]["text"], passages[0]["source"]) == ("Gorse has a mint.", str(corpus / "odd.pdf"))


def test_ingest_refuses_what_is_no_corpus(tmp_path: Path, options: list[str], store: Path) -> None:
    assert "nowhere: No such file" in refused("ingest", tmp_path / "nowhere", *options)
    (tmp_path / "file.md").write_text("text")
    assert "file.md: Not a directory" in refused("ingest", tmp_path / "file.md", *options)
    (tmp_path / "empty").mkdir()
    assert "holds no files to ingest (.htm, .html, .md, .pdf, .txt)" in refused("ingest", tmp_path / "empty", *options)
    (tmp_path / "empty" / "blank.txt").write_text("\n\n")
    assert "are empty" in refused("ingest", tmp_path / "empty", *options)


def test_ingest_refuses_a_chunk_size_beyond_the_context(corpus: Path, options: list[str], store: Path) -> None:
    (corpus / "long.txt").write_text("word " * 2000)
    assert "split it into smaller chunks" in refused("ingest", corpus, *options, "--chunk-tokens", 100_000)


def test_a_store_that_cannot_be_made_is_one_line(corpus: Path, models: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for where in (tmp_path / "file", tmp_path / "file" / "below", "/proc/store"):
        assert str(where) in refused("ingest", corpus, "--model", models[0], "--store", where)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    assert "not a chunk store" in refused("ingest", corpus, "--model", models[0], "--store", tmp_path / "other")


def test_a_full_disk_is_one_line_and_what_is_stored_stays(corpus: Path, options: list[str], store: Path) -> None:
    whole = document("ingest", corpus, *options)["stored"]
    shutil.rmtree(store)
    (corpus / "long.txt").write_text("word " * 500)
    # A limit on file sizes fails writes as a full disk does. Small chunks fit, the long one does not.
    ran = subprocess.run(
        [sys.executable, "-m", "cacheblend_rag.cli", "ingest", corpus, *options, "--chunk-tokens", "3000"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.splitlines()[-1].startswith(f"error: the chunk store {store} can't be written (File too large)")
    assert "Traceback" not in ran.stderr and "\x1b" not in ran.stderr
    assert len(chunk_files(store)) == whole


def test_interrupted_it_goes_on_where_it_was(tmp_path: Path, options: list[str], store: Path) -> None:
    corpus = tmp_path / "large"
    corpus.mkdir()
    rng = random.Random(0)
    for number in range(8):
        lines = ("".join(rng.choices("abcdefgh", k=60)) for _ in range(10))
        (corpus / f"{number:02}.txt").write_text("\n".join(lines))
    command = [sys.executable, "-m", "cacheblend_rag.cli", "ingest", corpus, *options, "--chunk-tokens", "61"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, these tests among them perhaps, ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while len(chunk_files(store)) < 25:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    stored = len(chunk_files(store))
    assert 25 <= stored < 80
    done_files = int(err.splitlines()[-1].removeprefix("interrupted: ").split(" of 8 files done; run the same")[0])
    assert done_files in (stored // 10, stored // 10 - 1)

    report = document("ingest", corpus, *options, "--chunk-tokens", 61)
    assert (report["stored"], report["already_there"]) == (80 - stored, stored)
    assert done("store", "verify", "--store", store).startswith("80 chunks sound, 0 problems")


def test_progress_is_shown_on_a_terminal(corpus: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "cacheblend_rag.cli", "ingest", corpus, *options, "--json"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    assert process.stdout is not None
    assert json.loads(process.stdout.read())["files"] == 3
    assert process.wait(60) == 0
    assert b"loading" in shown and b".md, chunk " in shown


# Profile


QUESTIONS = [
    {"question": "When was the bridge of Arvel finished?", "answer": "1342", "passages": [TOWNS["arvel"]]},
    {"question": "Who is the mayor of Bessel?", "answer": "Dessa Pallimore", "passages": [TOWNS["bessel"]]},
    {"question": "From what does Corvy live?", "answer": "salt", "passages": [TOWNS["corvy"]]},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    return path


def test_profile_measures_a_model(small_smollm2: str, store: Path, questions: Path) -> None:
    arguments = ["profile", small_smollm2, "--store", store, "--data", questions, "--dtype", "float32"]
    report = document(*arguments, "--questions", 1, "--ratio", 0.2)
    assert json.loads(Path(report.pop("path")).read_text()) == report
    assert report["question_layers"] == [2, 4]  # one question shows nothing beyond chance
    measured = report["measured"]
    assert (measured["questions"], measured["recompute_ratio"], measured["left_out"]) == (1, 0.2, [])
    assert measured["candidates"][0]["layers"] == [2, 4]
    assert 0 < min(row["kl"] for row in measured["candidates"]) < measured["full_reuse_kl"]
    assert chunk_files(store) == []  # what was warmed for it is gone
    with cacheblend_rag.load_engine(small_smollm2, store=store, dtype="float32") as engine:
        assert engine.blend.question_layers == (2, 4)


def test_profile_for_people(models: list[str], store: Path, questions: Path) -> None:
    text = done("profile", models[0], "--store", store, "--data", questions)
    assert "3 questions, 0.15 recomputed" in text and "last half" in text
    (path,) = store.glob("profiles/*.json")
    assert text.splitlines()[-2:] == [
        f"question_layers of {models[0]}: 2 to 3 of 4 (too few questions to tell)",
        f"kept in {path}",
    ]


@pytest.mark.parametrize(
    "command",
    [
        ("ingest", "docs", "--model", "m"),
        ("query", "who?", "--model", "m"),
        ("inspect", "who?", "--model", "m"),
        ("doctor", "--model", "m"),
        ("serve", "m"),
        ("profile", "m"),
        ("dashboard",),
        ("store", "ls"),
    ],
    ids=lambda command: command[0],
)
def test_a_store_that_is_a_file_is_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert refused(*command, "--store", tmp_path / "notes.txt").endswith("notes.txt is a file: give a directory")


def deny_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)


def test_a_store_that_can_not_be_read_is_one_line(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny_directories(monkeypatch)
    said = refused("query", "Who?", "--model", models[0], "--store", tmp_path)
    assert said.endswith("can't be read (Permission denied); check its permissions")


def test_profile_is_refused_in_one_line(
    make_model: Callable[..., str], models: list[str], store: Path, tmp_path: Path, questions: Path
) -> None:
    assert "does not exist" in refused("profile", "./nowhere", "--store", store)
    unsupported = make_model("gpt2", model_type="gpt2", n_layer=2, n_embd=64, n_head=4)
    assert "\n" not in refused("profile", unsupported, "--store", store, "--data", questions)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").touch()
    assert "not a chunk store" in refused("profile", models[0], "--store", tmp_path / "other")
    assert "No such file" in refused("profile", models[0], "--store", store, "--data", tmp_path / "nothing.jsonl")
    questions.write_text("{}\n")
    assert "line 1: there must be a question" in refused("profile", models[0], "--store", store, "--data", questions)
    questions.write_text(json.dumps({**QUESTIONS[0], "passages": ["long " * 2000]}))
    assert "no question could be measured" in refused("profile", models[0], "--store", store, "--data", questions)
    assert list(store.glob("profiles/*")) == []


# Query


@pytest.mark.usefixtures("ingested")
class TestQuery:
    def test_it_retrieves_and_blends(self, options: list[str], corpus: Path) -> None:
        answer = document("query", "Who is the mayor of Bessel?", *options, "--mode", "blend", "--top-k", 3)
        stats = answer["stats"]
        assert stats["decision"] == "blend"
        assert stats["policy"] == "query_aware"
        assert answer["passages"][0]["source"] == str(corpus / "bessel.md")
        assert "Dessa Pallimore" in answer["passages"][0]["text"]
        assert len(answer["passages"]) == 3
        known = sum(len(passage["text"]) for passage in answer["passages"])  # tokens are bytes
        assert 0.9 * known < stats["reused_tokens"] + stats["recomputed_tokens"] <= known
        assert stats["segments"] >= 2
        assert "full_prefill" not in answer

    def test_for_people(self, options: list[str]) -> None:
        text = done("query", "Who is the mayor of Bessel?", *options, "--mode", "blend", "--compare")
        for part in ("decision  blend: mode is blend", "reused +", "ttft", "full prefill", "speed-up", "bessel.md #0"):
            assert part in text

    def test_where_the_time_went_and_what_was_chosen(self, options: list[str], tmp_path: Path) -> None:
        ask = ["query", "Who is the mayor of Bessel?", *options, "--mode", "blend", "--trace"]
        path = tmp_path / "trace.json"
        text = done(*ask, "--compare", "--trace-file", path)
        for part in ("rest", "load", "select", "recompute", "first token", "in all"):
            assert re.search(rf"^  {part} +[\d.]+ ms", text, re.M)
        counts = r"^  (\d+) of (\d+) matched tokens \(\S+%\) by query_aware, scores"
        ((total, matched),) = re.findall(counts, text, re.M)
        runs = re.findall(r"^ +(\d+) of (\d+) at \d+ to \d+, chunk [0-9a-f]{12}$", text, re.M)
        assert len(runs) > 2
        assert sum(int(chosen) for chosen, _ in runs) == int(total)
        assert sum(int(length) for _, length in runs) == int(matched)
        names = {event["args"]["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "M"}
        assert names == {"cacheblend", "answer", "full prefill"}
        answer = document(*ask)
        assert len(answer["trace"]["recomputed"]) == answer["stats"]["recomputed_tokens"]
        assert "trace" not in document(*ask[:-1])
        assert "nothing was blended" in done(*ask, "--mode", "off")
        bad = run(*ask, "--trace-file", tmp_path / "nowhere" / "trace.json")
        assert bad.exit_code == 2
        assert "there is no directory" in " ".join(bad.stderr.split())

    def test_inspect_draws_what_was_chosen(self, options: list[str], tmp_path: Path) -> None:
        page, picture = tmp_path / "page.html", tmp_path / "picture.png"
        ask = ["inspect", "Who is the mayor of Bessel?", *options]
        text = done(*ask, "--html", page, "--png", picture)
        assert re.search(r"they hold [\d.]+% of the deviation from full prefill; as many could hold [\d.]+%", text)
        assert text.endswith(f"written to {page}\nwritten to {picture}\n")
        assert picture.read_bytes().startswith(b"\x89PNG")
        found = document(*ask, "--policy", "hkvd", "--ratio", 0.3)
        assert len(found["trace"]["recomputed"]) == found["stats"]["recomputed_tokens"]
        assert 0 < found["deviation"]["held_by_recomputed"] <= found["deviation"]["most_that_as_many_hold"] < 1
        assert page.read_text("utf-8").count('class="recomputed" style') == document(*ask)["stats"]["recomputed_tokens"]

    def test_inspect_says_what_is_missing(self, options: list[str], tmp_path: Path) -> None:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("Nothing of this is known.")
        ask = ["inspect", *options, "--prompt-file", prompt]
        assert refused(*ask).startswith("nothing of this prompt was blended (no known chunk in the prompt)")
        assert refused(*ask, "--png", tmp_path / "a.gif").startswith("the picture's name must end in .png or .svg")
        assert refused("inspect", "why", *options[:2], "--store", tmp_path / "none").startswith(
            "there is no chunk store"
        )
        for bad in (["inspect", *options], [*ask, "--html", tmp_path / "nowhere" / "a.html"]):
            assert run(*bad).exit_code == 2

    def test_settings_reach_the_engine(self, options: list[str]) -> None:
        ask = ["query", "salt company", *options, "--mode", "blend"]
        none, some = document(*ask, "--ratio", 0), document(*ask, "--ratio", 0.5, "--policy", "hkvd")
        assert none["stats"]["recomputed_tokens"] == 0 < some["stats"]["recomputed_tokens"]
        assert some["stats"]["policy"] == "hkvd"
        adapted = document(*ask, "--ratio", "auto")["stats"]
        share = adapted["recomputed_tokens"] / (adapted["recomputed_tokens"] + adapted["reused_tokens"])
        assert 0.04 < share <= 0.5
        forced = document(*ask, "--policy", "none", "--forced-tokens", 2)["stats"]
        assert 0 < forced["recomputed_tokens"] <= 2 * forced["segments"]
        assert document(*ask[:-1], "off")["stats"]["decision"] == "prefill"
        assert document(*ask[:-1], "auto")["stats"]["reason"].endswith("min_reused_tokens is 512")

    def test_ratio_1_and_full_prefill_answer_alike(self, options: list[str]) -> None:
        ask = ["query", "salt company", *options, "--mode", "blend", "--ratio", 1, "--compare", "--max-tokens", 20]
        answer = document(*ask)
        assert answer["answer"] == answer["full_prefill"]["answer"]
        assert answer["full_prefill"]["stats"]["decision"] == "prefill"
        assert answer["full_prefill"]["ttft_ratio"] == pytest.approx(
            answer["full_prefill"]["stats"]["ttft"] / answer["stats"]["ttft"]
        )

    def test_a_prompt_file_is_the_whole_prompt(self, options: list[str], corpus: Path, tmp_path: Path) -> None:
        prompt = tmp_path / "prompt.txt"
        prompt.write_text(f"{TOWNS['corvy']} and {TOWNS['arvel']} What?")
        answer = document("query", *options, "--mode", "blend", "--prompt-file", prompt)
        assert answer["passages"] == []
        assert answer["stats"]["prompt_tokens"] == len(prompt.read_text())
        assert answer["stats"]["decision"] == "blend"
        piped = done(*["query", *options, "--mode", "blend", "--prompt-file", "-", "--json"], stdin=prompt.read_text())
        assert json.loads(piped)["answer"] == answer["answer"]

    def test_another_models_store_says_whose_it_is(
        self, options: list[str], models: list[str], store: Path, primer: Path
    ) -> None:
        ask = ["query", "salt", "--model", models[1], "--store", store, "--primer", primer]
        line = refused(*ask)
        assert f"holds no chunks of {models[1]} (float32, namespace default)" in line
        assert f"only of {models[0]} (float32, namespace default); " in line
        assert line.endswith(f"cacheblend ingest DIR --model {models[1]} --store {store} --namespace default")
        assert f"only of {models[0]} (float32, namespace default)" in refused(
            "query", "salt", *options, "--namespace", "elsewhere"
        )
        assert "another primer" in refused("query", "salt", *options[:4])
        result = run(*ask[:1], *ask[2:], "--prompt-file", "-", stdin="A prompt is answered all the same.")
        assert result.exit_code == 0
        assert f"note: store {store} holds no chunks of {models[1]}" in result.stderr

    def test_an_emptied_store_says_so(self, options: list[str], store: Path) -> None:
        done("store", "rm", "--all", "--yes", "--store", store)
        assert "holds no corpus to search" in refused("query", "salt", *options)

    def test_chunks_evicted_since_are_prefilled(self, options: list[str], store: Path) -> None:
        for path in chunk_files(store):
            path.unlink()
        stats = document("query", "salt company", *options, "--mode", "blend")["stats"]
        assert stats["decision"] == "prefill"

    def test_damaged_chunks_leave_stdout_clean(self, options: list[str], store: Path) -> None:
        expected = document("query", "salt company", *options, "--mode", "off")["answer"]
        for path in chunk_files(store):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        answer = document("query", "salt company", *options, "--mode", "blend")
        assert answer["answer"] == expected
        assert answer["stats"]["faults"] > 0

    def test_bad_settings_are_one_line(
        self, options: list[str], models: list[str], store: Path, tmp_path: Path
    ) -> None:
        ask = ["query", "salt", *options]
        assert 'recompute_ratio must be a number in [0, 1] or "auto", not 1.5' in refused(*ask, "--ratio", 1.5)
        assert "recompute_ratio" in refused(*ask, "--ratio", "nan")
        assert "unknown policy 'best': known are" in refused(*ask, "--policy", "best")
        assert "mode must be one of" in refused(*ask, "--mode", "fast")
        assert "unknown engine 'jax'" in refused(*ask, "--engine", "jax")
        assert "dtype must be" in refused(*ask, "--dtype", "int3")
        assert "device 'nowhere'" in refused(*ask, "--device", "nowhere")
        assert "/nowhere/model" in refused("query", "salt", "--model", "/nowhere/model", "--store", store)
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "is not a transformers model" in refused("query", "salt", "--model", empty, "--store", store)
        assert "shares a word" in refused("query", "xylophone?", *options)
        assert "shares a word" in refused("query", "", *options)

    def test_bad_prompts_are_one_line(self, options: list[str], tmp_path: Path) -> None:
        ask = ["query", *options, "--prompt-file"]
        assert refused(*ask, tmp_path / "nowhere") == f"{tmp_path}/nowhere: No such file or directory"
        assert refused(*ask, tmp_path) == f"{tmp_path}: Is a directory"
        assert "- is not UTF-8 text (byte 0xe9 at 3)" in refused(*ask, "-", stdin=b"caf\xe9")
        assert "context is 4096" in refused(*ask, "-", stdin="a" * 5000)
        assert "no tokens" in refused(*ask, "-", stdin="")
        assert "nowhere: No such file" in refused("query", "salt", *options[:4], "--primer", tmp_path / "nowhere")

    def test_a_damaged_catalogue_is_one_line(self, options: list[str], store: Path) -> None:
        (store / "catalog.sqlite").write_bytes(b"no database" * 100)
        assert "is damaged" in refused("query", "salt", *options)


def test_no_store_is_one_line_and_makes_none(options: list[str], store: Path) -> None:
    for command in (["query", "salt", *options], ["store", "ls", "--store", store]):
        assert f"there is no chunk store at {store}" in refused(*command)
        assert not store.exists()
    store.mkdir()
    assert f"there is no chunk store at {store}" in refused("store", "verify", "--store", store)
    assert list(store.iterdir()) == []


def test_a_model_without_chat_template_is_one_line(
    corpus: Path, models: list[str], store: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(models[0], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    done("ingest", corpus, "--model", bare, "--store", store)
    assert "has no chat template" in refused("query", "salt", "--model", bare, "--store", store)


# Store


@pytest.fixture
def two_namespaces(corpus: Path, options: list[str]) -> Iterator[dict[str, int]]:
    yield {
        name: document("ingest", corpus, *options, "--chunk-tokens", size, "--namespace", name)["stored"]
        for name, size in (("red", 80), ("blue", 60))
    }


def test_ls_lists_all_chunks(two_namespaces: dict[str, int], store: Path, models: list[str]) -> None:
    listed = document("store", "ls", "--store", store)
    assert sorted(chunk["key"] for chunk in listed["chunks"]) == sorted(path.stem for path in chunk_files(store))
    for name, count in two_namespaces.items():
        assert [chunk["namespace"] for chunk in listed["chunks"]].count(name) == count
    assert {chunk["model"] for chunk in listed["chunks"]} == {models[0]}
    assert listed["bytes"] == sum(path.stat().st_size for path in chunk_files(store))
    *lines, total = done("store", "ls", "--store", store).splitlines()[1:]
    assert [line.split()[0] for line in lines] == [chunk["key"] for chunk in listed["chunks"]]
    assert total.startswith(f"{len(lines)} chunks, ")


def test_verify_finds_damage(two_namespaces: dict[str, int], store: Path) -> None:
    files = chunk_files(store)
    report = document("store", "verify", "--store", store)
    assert (report["ok"], report["problems"]) == (len(files), [])
    flipped = bytearray(files[0].read_bytes())
    flipped[len(flipped) // 2] ^= 4
    files[0].write_bytes(flipped)
    files[1].unlink()
    result = run("store", "verify", "--store", store, "--json", "--repair")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["ok"] == len(files) - 2
    assert {(problem["key"], problem["state"]) for problem in report["problems"]} == {
        (files[0].stem, "corrupt"),
        (files[1].stem, "missing"),
    }
    assert document("store", "verify", "--store", store)["problems"] == []


def test_rm_by_key_namespace_and_all(two_namespaces: dict[str, int], store: Path, options: list[str]) -> None:
    key = chunk_files(store)[0].stem
    assert document("store", "rm", key[:20], "--yes", "--store", store)["removed"] == 1
    assert key not in [path.stem for path in chunk_files(store)]
    assert "no chunk's key begins with" in refused("store", "rm", key, "--yes", "--store", store)

    left = len(chunk_files(store))
    red = document("store", "rm", "--namespace", "red", "--yes", "--store", store)["removed"]
    assert {chunk["namespace"] for chunk in document("store", "ls", "--store", store)["chunks"]} == {"blue"}
    assert "holds no chunks of" in refused("query", "salt", *options, "--namespace", "red")
    assert document("query", "salt", *options, "--namespace", "blue")["passages"] != []

    assert document("store", "rm", "--all", "--yes", "--store", store)["removed"] == left - red
    assert chunk_files(store) == []
    assert document("store", "ls", "--store", store)["chunks"] == []


def test_rm_asks(two_namespaces: dict[str, int], store: Path) -> None:
    before = chunk_files(store)
    for reply in ("n\n", ""):
        result = run("store", "rm", "--all", "--store", store, stdin=reply)
        assert result.exit_code == 1
        assert f"Remove {len(before)} chunks" in result.stderr
        assert chunk_files(store) == before
    result = run("store", "rm", "--all", "--store", store, "--json", stdin="y\n")
    printed = result.stdout.removeprefix(" y\n")  # the runner's echo of the reply
    assert json.loads(printed)["removed"] == len(before)
    assert chunk_files(store) == []


# A real model


def test_a_small_model_finds_the_answer(smollm2: str, corpus: Path, store: Path) -> None:
    options = ["--model", smollm2, "--store", store]
    done("ingest", corpus, *options)
    answer = document("query", "Who is the mayor of Bessel?", *options, "--mode", "blend", "--compare")
    assert answer["stats"]["decision"] == "blend"
    assert "Pallimore" in answer["answer"]
    assert "Pallimore" in answer["full_prefill"]["answer"]


# doctor


class TestDoctor:
    """On a random model, whose answers depend on every bit: near enough is whatever is asked for."""

    FINE = ("--max-kl", 100, "--count", 1)

    @pytest.fixture(autouse=True)
    def few_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And short prompts, to save time."""
        monkeypatch.setattr(sweep, "settings_to_try", lambda *args: settings_to_try(*args)[:2])
        monkeypatch.setattr(profiling_data, "PASSAGES", 2)
        monkeypatch.setattr(comparing, "ANSWER_TOKENS", 4)

    @pytest.fixture
    def only_checks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the store: no prompts are read, and nothing is measured."""
        monkeypatch.setattr(Embedded, "check_exactness", lambda *args: [])
        monkeypatch.setattr(sweep, "sweep", lambda *args, **options: None)

    @pytest.fixture
    def ask(self, options: list[str]) -> list[Any]:
        return ["doctor", *options, *self.FINE]

    @pytest.mark.usefixtures("ingested")
    def test_a_store_and_its_model(self, ask: list[Any], store: Path) -> None:
        before = {path: path.read_bytes() for path in chunk_files(store)}
        result = run(*ask, "--json")
        found = json.loads(result.stdout)
        checks = {check["name"]: check for check in found["checks"]}
        wrong = [name for name, check in checks.items() if not check["ok"]]
        assert set(wrong) <= {"the first token comes sooner", "reading beats prefill"}  # a model of a millisecond
        assert result.exit_code == bool(wrong)
        assert list(checks["model"]) == ["name", "ok", "figure", "advice"]
        assert checks["chunks of this model"]["figure"] == f"{len(before)} of {len(before)}"
        for name in ("ratio 1 is full prefill", "exact KV gives exact answers, ratio 0.15", "the question is found"):
            assert checks[name]["ok"], checks[name]
        assert [setting["name"] for setting in found["settings"]][:2] == ["query_aware 15%", "query_aware 5%"]
        assert "soonest and near enough: " in found["verdict"]
        assert all(setting["kl_per_token"] > 0 for setting in found["settings"])
        assert len(found["answers"]) == 1
        assert before == {path: path.read_bytes() for path in chunk_files(store)}  # nothing is tried in it

    def test_for_people(self, models: list[str], primer: Path) -> None:
        result = run("doctor", "--model", models[0], "--primer", primer, *self.FINE)
        assert "sample text" in result.stderr
        for part in ("cacheblend doctor", "versions", "query_aware 15%", "full prefill", "checks"):
            assert part in result.stdout

    @pytest.mark.usefixtures("only_checks")
    def test_no_store(self, ask: list[Any], tmp_path: Path) -> None:
        nothing = tmp_path / "nothing"
        nothing.mkdir()
        result = run("doctor", *ask[1:3], "--store", nothing, "--json")
        assert result.exit_code == 1
        (check,) = [one for one in json.loads(result.stdout)["checks"] if one["name"] == "store"]
        assert (check["ok"], check["figure"]) == (False, f"there is none at {nothing}")
        assert check["advice"].startswith("cacheblend ingest DIR")
        (nothing / "chunks").write_text("no directory")
        result = run("doctor", *ask[1:3], "--store", nothing, "--json")
        (check,) = [one for one in json.loads(result.stdout)["checks"] if one["name"] == "store"]
        assert not check["ok"]

    @pytest.mark.usefixtures("only_checks")
    def test_a_store_that_can_not_be_read(
        self, ask: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        deny_directories(monkeypatch)
        result = run("doctor", *ask[1:3], "--store", tmp_path, "--json")
        (check,) = [one for one in json.loads(result.stdout)["checks"] if one["name"] == "store"]
        assert (check["ok"], result.exit_code) == (False, 1)
        assert "can't be read (Permission denied)" in check["figure"]

    @pytest.mark.usefixtures("only_checks", "ingested")
    def test_a_store_of_another_model(self, ask: list[Any], models: list[str]) -> None:
        found = json.loads(run("doctor", "--model", models[1], *ask[3:], "--json").stdout)
        (check,) = [one for one in found["checks"] if one["name"] == "chunks of this model"]
        assert not check["ok"]
        assert check["figure"].startswith("none of ")

    @pytest.mark.usefixtures("ingested")
    def test_prompts_of_ones_own(self, ask: list[Any], tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        asked = [{"prompt": " ".join(TOWNS.values()) + " Who is the mayor of Bessel?"}]
        asked += [{"question": "Who is the mayor?", "passages": list(TOWNS.values())}]
        path.write_text("\n".join(map(json.dumps, asked)))
        found = json.loads(run(*ask, "--prompts", path, "--json").stdout)
        assert len(found["answers"]) == 2
        assert next(check["ok"] for check in found["checks"] if check["name"] == "known chunks are in the prompts")
        path.write_text(json.dumps({"prompt": "Nothing of this is known to anybody. " * 4}))
        result = run(*ask, "--prompts", path, "--json")
        assert result.exit_code == 1
        last = json.loads(result.stdout)["checks"][-1]
        assert (last["name"], last["ok"]) == ("known chunks are in the prompts", False)
        for text, said in (
            (b"{", "line 1 is not JSON"),
            (b"[]", 'there must be a "prompt"'),
            (b"", "holds no prompts"),
            (b"\xff", "is not UTF-8 text"),
        ):
            path.write_bytes(text)
            assert said in refused("doctor", "--model", "not loaded", "--prompts", path)

    def test_there_is_no_room_for_the_chunks_of_all_prompts(
        self, ask: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But for those of one at a time."""
        stored: list[int] = []

        class Small(MemoryStore):
            def __init__(self, max_bytes: int) -> None:
                super().__init__(max_bytes // 8)
                stored.append(-self.max_bytes)

            def put(self, chunk: ChunkKV) -> int:
                stored.append(super().put(chunk))
                return stored[-1]

        monkeypatch.setattr(embedded, "MemoryStore", Small)
        monkeypatch.setattr(embedded, "_LEAST_BYTES", 0)
        path = tmp_path / "prompts.jsonl"
        texts = [f"Town {n}. {text}" for n in range(2) for text in TOWNS.values()]
        asked = [{"question": "Who is the mayor?", "passages": texts[n : n + len(TOWNS)]} for n in (0, 3)]
        path.write_text("\n".join(map(json.dumps, asked)))
        checks = json.loads(run(*ask, "--prompts", path, "--json").stdout)["checks"]
        assert next(check["ok"] for check in checks if check["name"] == "known chunks are in the prompts")
        assert sum(stored) > 0

    def test_a_model_that_can_not_be_blended(self, make_model: Callable[..., str], tmp_path: Path) -> None:
        model = make_model("learned", model_type="gpt2", n_embd=64, n_head=4, n_layer=2)
        result = run("doctor", "--model", model, "--json")
        assert result.exit_code == 1
        last = json.loads(result.stdout)["checks"][-1]
        assert (last["name"], last["ok"]) == ("model", False)
        assert "can't be blended" in last["figure"]
