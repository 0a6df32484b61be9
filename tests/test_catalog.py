"""The catalogue: what it holds, what it finds, and how it shares its file."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.catalog import FILE_NAME, Catalog, forget_documents
from cacheblend_rag.chunks import ChunkScope, ModelFingerprint
from cacheblend_rag.errors import StoreError


def scope(namespace: str = "default", model: str = "m") -> ChunkScope:
    return ChunkScope(namespace, ModelFingerprint(model, model, "config", "tokenizer", "float32"), (1, 2))


@pytest.fixture
def catalog(tmp_path: Path):
    with Catalog(tmp_path, scope()) as opened:
        yield opened


# What it holds


def test_a_document_is_unfinished_until_finished(catalog: Catalog) -> None:
    assert catalog.digest("a.md") is None
    catalog.begin("a.md", ["one", "two"])
    assert catalog.digest("a.md") is None
    assert catalog.texts("a.md") == ["one", "two"]
    catalog.finish("a.md", "d1")
    assert catalog.digest("a.md") == "d1"
    catalog.begin("a.md", ["three"])
    assert catalog.digest("a.md") is None
    assert catalog.texts("a.md") == ["three"]


def test_it_is_the_same_after_reopening(tmp_path: Path) -> None:
    with Catalog(tmp_path, scope()) as first:
        first.begin("a.md", ["the quick brown fox"])
        first.finish("a.md", "d")
    with Catalog(tmp_path, scope()) as second:
        assert second.sources() == ["a.md"]
        assert second.digest("a.md") == "d"
        assert [hit.text for hit in second.search("fox", 5)] == ["the quick brown fox"]


documents = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.lists(st.sampled_from(["x y", "y z", "z", "w x", "v"]), max_size=4)
)


@given(steps=st.lists(st.one_of(documents, st.sampled_from(["a", "b", "c"])), min_size=1, max_size=6))
def test_it_agrees_with_a_dictionary(steps: list[dict[str, list[str]] | str], tmp_path_factory) -> None:
    expected: dict[str, list[str]] = {}
    with Catalog(tmp_path_factory.mktemp("store"), scope()) as catalog:
        for step in steps:
            if isinstance(step, str):
                catalog.remove(step)
                expected.pop(step, None)
            else:
                for source, texts in step.items():
                    catalog.begin(source, texts)
                expected |= step
        assert catalog.sources() == sorted(expected)
        for source, texts in expected.items():
            assert catalog.texts(source) == texts
            others = {text for other, theirs in expected.items() if other != source for text in theirs}
            assert set(catalog.exclusive_texts(source)) == set(texts) - others
        everything = {text for texts in expected.values() for text in texts}
        for word in "vwxyz":
            assert {hit.text for hit in catalog.search(word, 100)} == {text for text in everything if word in text}


def test_scopes_do_not_meet(tmp_path: Path) -> None:
    with Catalog(tmp_path, scope()) as mine, Catalog(tmp_path, scope(model="other")) as theirs:
        mine.begin("a.md", ["shared words", "my words"])
        theirs.begin("a.md", ["shared words"])
        assert {hit.text for hit in mine.search("words", 9)} == {"shared words", "my words"}
        assert {hit.text for hit in theirs.search("words", 9)} == {"shared words"}
        assert set(mine.exclusive_texts("a.md")) == {"shared words", "my words"}
        mine.remove("a.md")
        assert theirs.texts("a.md") == ["shared words"]


def test_forgetting_a_namespace_and_everything(tmp_path: Path) -> None:
    assert forget_documents(tmp_path) == 0
    assert not (tmp_path / FILE_NAME).exists()
    scopes = [scope("one"), scope("one", "other"), scope("two")]
    for each in scopes:
        with Catalog(tmp_path, each) as catalog:
            catalog.begin("a.md", ["some text"])
    assert forget_documents(tmp_path, "one") == 2
    with Catalog(tmp_path, scope("two")) as catalog:
        assert [hit.text for hit in catalog.search("text", 3)] == ["some text"]
    assert forget_documents(tmp_path) == 1
    with Catalog(tmp_path, scope("two")) as catalog:
        assert catalog.sources() == []
        assert catalog.search("text", 3) == []


# What it finds


def test_the_passage_with_the_rare_words_comes_first(catalog: Catalog) -> None:
    common = [f"the harbour of town {number} was built by the council of the town" for number in range(30)]
    catalog.begin("towns.md", [*common, "the harbour chain of Quorrin was built by wardens"])
    hits = catalog.search("Who built the harbour chain of Quorrin?", 5)
    assert len(hits) == 5
    assert hits[0].text == "the harbour chain of Quorrin was built by wardens"
    assert (hits[0].source, hits[0].position) == ("towns.md", 30)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].score > 0


def test_a_text_in_two_documents_is_found_once(catalog: Catalog) -> None:
    catalog.begin("a.md", ["copied words", "more words"])
    catalog.begin("b.md", ["copied words"])
    assert sorted(hit.text for hit in catalog.search("words", 2)) == ["copied words", "more words"]


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ('what is "NEAR" (a OR b) AND* NOT c^2: {text}-column?', "a column of text"),
        ("mayor's/alderman", "the alderman"),
        ("WHO", "who is it"),
        ("cafe\u0301s", "a caf\u00e9 in town"),
        ("stra\u00dfe", "die Stra\u00dfe"),
        ("bridges", "a bridge"),
        ("\u043c\u043e\u0441\u0442", "\u0441\u0442\u0430\u0440\u044b\u0439 \u041c\u041e\u0421\u0422"),
        ("year 1342?", "in 1342."),
        ("a\x00b unknown", "word b"),
    ],
)
def test_questions_are_text_and_no_syntax(catalog: Catalog, question: str, text: str) -> None:
    catalog.begin("a.md", [text, "something else entirely"])
    assert text in [hit.text for hit in catalog.search(question, 5)]


@given(question=st.text(max_size=60))
def test_no_question_is_an_error(question: str, tmp_path_factory) -> None:
    with Catalog(tmp_path_factory.getbasetemp(), scope()) as catalog:
        catalog.search(question, 3)


def test_a_question_without_words_finds_nothing_and_a_huge_one_works(catalog: Catalog) -> None:
    catalog.begin("a.md", ["needle in the hay"])
    assert catalog.search("?! -- '\"", 5) == []
    assert catalog.search("", 5) == []
    words = " ".join(f"w{number}" for number in range(20_000))
    assert [hit.text for hit in catalog.search(f"{words} needle", 5)] == ["needle in the hay"]


# Its file


def test_the_file_is_private(tmp_path: Path) -> None:
    with Catalog(tmp_path, scope()) as catalog:
        catalog.begin("a.md", ["secret"])
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def _write(directory: str, worker: int, rounds: int) -> None:
    with Catalog(directory, scope()) as catalog:
        for number in range(rounds):
            source = f"{worker}-{number}.md"
            catalog.begin(source, [f"worker {worker} wrote text{number}", "common"])
            catalog.finish(source, "d")
            catalog.search("common", 2)
            if number % 3 == 0:
                catalog.remove(source)


def test_processes_may_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(str(tmp_path), worker, 40)) for worker in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    with Catalog(tmp_path, scope()) as catalog:
        kept = {f"{worker}-{number}.md" for worker in range(2) for number in range(40) if number % 3}
        assert set(catalog.sources()) == kept
        assert all(catalog.digest(source) == "d" for source in kept)
        assert [hit.text for hit in catalog.search("text7", 9)] == [f"worker {w} wrote text7" for w in range(2)]


@pytest.mark.parametrize("damage", [b"this is no database", b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_file_says_so(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(damage)
    with pytest.raises(StoreError, match=r"damaged.*delete it and ingest again"):
        Catalog(tmp_path, scope())


def test_a_newer_format_says_so(tmp_path: Path) -> None:
    Catalog(tmp_path, scope()).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="format 99"):
        Catalog(tmp_path, scope())


def test_a_directory_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"can't open the catalogue .*nowhere.*No such file"):
        Catalog(tmp_path / "nowhere", scope())


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    with Catalog(tmp_path, scope()) as catalog:
        catalog.begin("a.md", ["what was there"])
        catalog.finish("a.md", "d")
    # A limit on file sizes makes writes fail as a full disk does; it can't be lifted again, hence the process.
    program = (
        "import sys, test_catalog as t\n"
        "with t.Catalog(sys.argv[1], t.scope()) as catalog:\n"
        "    try:\n"
        "        catalog.begin('big.md', [str(n) * 1000 for n in range(2000)])\n"
        "    except t.StoreError as error:\n"
        "        print('refused:', error)\n"
        "    print(catalog.sources(), [hit.text for hit in catalog.search('there', 3)])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "refused: can't use the catalogue" in ran.stdout
    assert "['a.md'] ['what was there']" in ran.stdout
