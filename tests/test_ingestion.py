"""Ingestion with a real engine: what is found, read, split, warmed, recorded and evicted."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pdfs import encrypted, pdf

from cacheblend_rag import Engine, load_engine
from cacheblend_rag.catalog import Catalog
from cacheblend_rag.errors import ChunkTooLongError, ConfigError, IngestError, StoreError
from cacheblend_rag.ingestion import IngestProgress, IngestReport, find_files, ingest, read_chunks, split

WORDS = [a + b for a in ("bra", "dun", "kel", "mor", "sil", "tam") for b in ("ford", "gate", "low", "mere", "wick")]


def prose(seed: int, sentences: int = 12) -> str:
    rng = random.Random(seed)
    return "\n\n".join(
        " ".join(" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(2)) for _ in range(sentences // 2)
    )


@pytest.fixture(scope="session")
def models(make_model: Callable[..., str]) -> list[str]:
    """Two models. Their tokens are bytes."""
    settings = {"model_type": "llama", "max_position_embeddings": 4096}
    return [make_model("one", **settings), make_model("two", **settings, intermediate_size=96)]


@pytest.fixture
def engine(models: list[str], tmp_path: Path) -> Iterator[Engine]:
    with load_engine(models[0], store=tmp_path / "store", primer="A passage.\n") as loaded:
        yield loaded


@pytest.fixture
def catalog(engine: Engine, tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "store", engine.library.scope) as opened:
        yield opened


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    files = {"a.md": prose(1), "b.txt": prose(2), "sub/c.md": f"# Title\n\n{prose(3)}"}
    for name, text in files.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "corpus"


@pytest.fixture
def run(engine: Engine, catalog: Catalog, corpus: Path) -> Callable[..., IngestReport]:
    return lambda **settings: ingest(engine, corpus, catalog, **{"chunk_tokens": 120} | settings)


def keys(engine: Engine) -> set[str]:
    return {entry.key for entry in engine.library.store.entries()}


def recorded(catalog: Catalog) -> list[str]:
    return [text for source in catalog.sources() for text in catalog.texts(source)]


def assert_in_step(engine: Engine, catalog: Catalog) -> None:
    """Every text of the catalogue is warm, and no other chunk is stored."""
    texts = set(recorded(catalog))
    again = engine.warm(sorted(texts))
    assert (again.stored, again.already_there) == (0, len(texts))
    assert len(keys(engine)) == len(texts)
    assert all(catalog.digest(source) for source in catalog.sources())


# Finding


def test_it_finds_text_files_below_sorted_and_nothing_hidden(tmp_path: Path) -> None:
    names = ["z.txt", "a.md", "B.TXT", "sub/c.md", "sub/.hidden.md", ".git/d.md", "e.Pdf", "md", "f.md.bak", "g.html"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.md").mkdir()
    files, bad = find_files(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "B.TXT",
        "a.md",
        "e.Pdf",
        "g.html",
        "sub/c.md",
        "z.txt",
    ]
    assert bad == []


@contextlib.contextmanager
def no_superuser() -> Iterator[None]:
    """Permissions bind: the superuser, who may read all, becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_may_not_be_listed_is_bad_and_the_rest_is_found(tmp_path: Path) -> None:
    root = tmp_path / "corpus"
    (root / "closed").mkdir(parents=True)
    (root / "closed" / "a.md").touch()
    (root / "b.md").touch()
    for folder in [root, *root.parents]:
        if folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(0o755)
    (root / "closed").chmod(0)
    try:
        with no_superuser():
            files, bad = find_files(root)
    finally:
        (root / "closed").chmod(0o755)
    assert files == [root / "b.md"]
    assert [(item.path, item.reason) for item in bad] == [(str(root / "closed"), "Permission denied")]


@pytest.mark.parametrize(("make", "reason"), [(lambda path: None, "No such file"), (Path.touch, "Not a directory")])
def test_what_is_no_directory_is_an_error(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "corpus")
    with pytest.raises(IngestError, match=f"can't read the directory .*corpus: {reason}"):
        find_files(tmp_path / "corpus")


# Splitting


@pytest.mark.parametrize("suffix", [".md", ".txt"])
@pytest.mark.parametrize("chunk_tokens", [1, 15, 120, 5000])
def test_chunks_hold_the_whole_text_and_fit(engine: Engine, suffix: str, chunk_tokens: int) -> None:
    text = f"# Heading\n\n{prose(5)}\n\n- item one\n- item two \u00e9\u4e2d\u6587\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    chunks = split(text, suffix, chunk_tokens, engine.count_tokens)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert all(chunk == chunk.strip() != "" for chunk in chunks)
    # A single character can have more tokens than that, and is not cut.
    assert all(engine.count_tokens(chunk) <= chunk_tokens or len(chunk) == 1 for chunk in chunks)
    assert (len(chunks) == 1) == (engine.count_tokens(text) <= chunk_tokens)


def test_markdown_is_split_at_headings() -> None:
    sections = [f"# Part {number}\n\n{'word ' * 30}" for number in range(4)]
    chunks = split("\n\n".join(sections), ".md", 40, lambda text: len(text.split()))
    assert chunks == [section.strip() for section in sections]


# Ingesting


def test_all_files_are_warm_and_recorded(engine: Engine, catalog: Catalog, corpus: Path, run) -> None:
    report = run()
    assert report.files == 3
    assert report.bad == []
    assert report.stored == len(recorded(catalog)) > 6
    assert report.already_there == report.removed == report.evicted == 0
    assert report.tokens == sum(map(engine.count_tokens, recorded(catalog)))
    assert report.bytes == sum(entry.nbytes for entry in engine.library.store.entries())
    assert catalog.sources() == [str(corpus / name) for name in ("a.md", "b.txt", "sub/c.md")]
    assert_in_step(engine, catalog)


def test_again_stores_nothing(run) -> None:
    first, second = run(), run()
    assert (second.files, second.stored, second.already_there) == (3, 0, first.stored)
    assert second.tokens == second.bytes == second.evicted == 0


def test_again_with_another_path_to_the_same_directory(
    engine: Engine, catalog: Catalog, corpus: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.chdir(corpus.parent)
    assert ingest(engine, "corpus", catalog, chunk_tokens=120).stored == 0
    assert len(catalog.sources()) == 3


def test_chunks_evicted_meanwhile_are_warmed_again(engine: Engine, catalog: Catalog, run) -> None:
    before = run()
    assert engine.evict(recorded(catalog)[:3]) == 3
    after = run()
    assert (after.stored, after.already_there) == (3, before.stored - 3)
    assert_in_step(engine, catalog)


def test_a_changed_file_loses_its_old_chunks_only(engine: Engine, catalog: Catalog, corpus: Path, run) -> None:
    run()
    others, whole = keys(engine), (corpus / "a.md").read_text()
    old = catalog.texts(str(corpus / "a.md"))
    (corpus / "a.md").write_text(whole.replace(old[-1], prose(99, 2)))
    report = run()
    new = catalog.texts(str(corpus / "a.md"))
    assert old[-1] not in new and old[0] in new
    assert report.evicted == len(set(old) - set(new)) > 0
    assert report.stored == len(set(new) - set(old)) > 0
    assert len(others & keys(engine)) == len(others) - report.evicted
    assert_in_step(engine, catalog)


def test_another_chunk_size_replaces_the_chunks(engine: Engine, catalog: Catalog, run) -> None:
    first = run()
    second = run(chunk_tokens=300)
    assert second.evicted == first.stored
    assert second.stored == len(recorded(catalog)) < first.stored
    assert_in_step(engine, catalog)


def test_a_removed_file_leaves_unless_another_holds_its_text(engine: Engine, catalog: Catalog, corpus, run) -> None:
    (corpus / "copy.md").write_text((corpus / "a.md").read_text())
    first = run()
    assert first.already_there == len(catalog.texts(str(corpus / "a.md")))
    (corpus / "copy.md").unlink()
    second = run()
    assert (second.removed, second.evicted, second.stored) == (1, 0, 0)
    assert_in_step(engine, catalog)
    gone = catalog.texts(str(corpus / "b.txt"))
    (corpus / "b.txt").unlink()
    third = run()
    assert (third.removed, third.evicted, third.files) == (1, len(gone), 2)
    assert not set(gone) & set(recorded(catalog))
    assert_in_step(engine, catalog)


def test_another_directory_adds_to_the_corpus(engine: Engine, catalog: Catalog, tmp_path: Path, run) -> None:
    run()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.txt").write_text(prose(7))
    report = ingest(engine, tmp_path / "more", catalog, chunk_tokens=120)
    assert (report.files, report.removed, report.evicted) == (1, 0, 0)
    assert len(catalog.sources()) == 4
    assert_in_step(engine, catalog)


def test_two_models_share_a_store_and_keep_their_own(engine, catalog, corpus, run, models, tmp_path) -> None:
    first = run()
    other = load_engine(models[1], store=tmp_path / "store", primer="A passage.\n")
    with other, Catalog(tmp_path / "store", other.library.scope) as theirs:
        assert ingest(other, corpus, theirs, chunk_tokens=120).stored == first.stored
        (corpus / "a.md").unlink()
        removed = ingest(other, corpus, theirs, chunk_tokens=120)
        assert removed.removed == 1 and removed.evicted > 0
    assert len(catalog.sources()) == 3
    assert engine.warm(recorded(catalog)).stored == 0


class Stop(Exception):
    """Stands for whatever ends an ingestion."""


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
def test_it_goes_on_where_it_stopped(engine: Engine, catalog: Catalog, corpus: Path, run, after: int) -> None:
    warmed = 0

    def stop(at: IngestProgress) -> None:
        nonlocal warmed
        warmed += at.chunks_done > 0
        if warmed == after:
            raise Stop

    with pytest.raises(Stop):
        run(progress=stop)
    assert len(keys(engine)) == after
    report = run()
    assert report.already_there == after
    assert report.stored == len(recorded(catalog)) - after
    assert_in_step(engine, catalog)


def test_what_was_stored_of_a_file_is_evicted_if_it_changes_before_it_is_done(
    engine: Engine, catalog: Catalog, corpus: Path, run
) -> None:
    def stop(at: IngestProgress) -> None:
        if at.chunks_done == 2:
            raise Stop

    with pytest.raises(Stop):
        run(progress=stop)
    (corpus / "a.md").write_text(prose(98))
    assert run().evicted == 2
    assert_in_step(engine, catalog)


def test_progress_counts_files_and_chunks(catalog: Catalog, corpus: Path, run) -> None:
    seen: list[IngestProgress] = []
    run(progress=seen.append)
    assert {at.files for at in seen} == {3}
    assert [at.files_done for at in seen] == sorted(at.files_done for at in seen)
    for number, source in enumerate(catalog.sources()):
        chunks = len(catalog.texts(source))
        mine = [(at.chunks_done, at.chunks) for at in seen if at.file == source and at.files_done == number]
        assert mine == [(0, 0), *((done, chunks) for done in range(1, chunks + 1))]


# HTML and PDF


@pytest.fixture
def documents(corpus: Path) -> Path:
    (corpus / "page.html").write_text(f"<title>t</title><h1>Page</h1><p>{prose(4)}</p>")
    (corpus / "paper.PDF").write_bytes(pdf(*(prose(seed) for seed in (5, 6))))
    return corpus


def test_html_and_pdf_are_ingested_and_followed(engine, catalog, documents: Path, run) -> None:
    assert run().files == 5
    assert catalog.texts(str(documents / "page.html"))[0].startswith("Page")
    assert_in_step(engine, catalog)
    again = run()
    assert (again.stored, again.evicted, again.bad) == (0, 0, [])
    (documents / "page.html").write_text(f"<body><h1>Page</h1>\n\n<p>{prose(4)}</p></body>")  # shows the same
    assert (run().stored, run().evicted) == (0, 0)
    (documents / "paper.PDF").write_bytes(pdf(prose(5)))
    changed = run()
    assert changed.evicted > 0
    assert_in_step(engine, catalog)


def test_read_chunks_gives_the_texts_that_were_warmed(engine: Engine, catalog: Catalog, documents: Path, run) -> None:
    run()
    for source in catalog.sources():
        assert read_chunks(source, 120, engine.count_tokens) == catalog.texts(source) != []
    warmed = engine.warm(read_chunks(documents / "paper.PDF", 120, engine.count_tokens))
    assert (warmed.stored, warmed.already_there > 2) == (0, True)


# Bad input


def test_bad_documents_are_named_and_the_others_ingested(engine, catalog, documents: Path, run) -> None:
    (documents / "locked.pdf").write_bytes(encrypted(pdf("text"), "secret"))
    (documents / "scanned.pdf").write_bytes(pdf(""))
    (documents / "cut.pdf").write_bytes((documents / "paper.PDF").read_bytes()[:200])
    (documents / "blank.htm").write_text("<html></html>")
    (documents / "latin1.html").write_bytes("<p>caf\u00e9".encode("latin-1"))
    report = run()
    assert {Path(bad.path).name: bad.reason for bad in report.bad} == {
        "locked.pdf": "a PDF that needs a password: save it without one (qpdf --decrypt)",
        "scanned.pdf": "a PDF without text (scanned?): run OCR over it first (ocrmypdf)",
        "cut.pdf": "damaged PDF (Stream has ended unexpectedly): repair it, or save it again",
        "blank.htm": "HTML that shows no text: if scripts write it, save the page from a browser",
        "latin1.html": "not UTF-8 text (byte 0xe9 at 6): convert it",
    }
    assert report.files == 5
    assert_in_step(engine, catalog)


def test_bad_files_are_named_and_the_others_ingested(engine: Engine, catalog: Catalog, corpus: Path, run) -> None:
    (corpus / "binary.txt").write_bytes(b"PK\x03\x04\x00\x00data")
    (corpus / "latin1.md").write_bytes("caf\u00e9".encode("latin-1"))
    (corpus / "dangling.md").symlink_to(corpus / "nowhere")
    os.mkfifo(corpus / "pipe.txt")
    (corpus / os.fsdecode(b"name\xff.txt")).write_text("text")
    report = run()
    assert {Path(bad.path).name: bad.reason for bad in report.bad} == {
        "binary.txt": "not text but binary (it holds zero bytes)",
        "latin1.md": "not UTF-8 text (byte 0xe9 at 3): convert it",
        "dangling.md": "No such file or directory",
        "pipe.txt": "not a regular file",
        os.fsdecode(b"name\xff.txt"): "its name is not UTF-8",
    }
    assert report.files == 3
    assert_in_step(engine, catalog)


def test_a_file_that_becomes_bad_keeps_its_chunks(engine: Engine, catalog: Catalog, corpus: Path, run) -> None:
    run()
    before = keys(engine)
    (corpus / "a.md").write_bytes(b"\xff\xfe")
    report = run()
    assert (report.files, report.removed, report.evicted, len(report.bad)) == (2, 0, 0, 1)
    assert keys(engine) == before


def test_files_below_a_directory_that_may_not_be_listed_keep_their_chunks(
    engine, catalog, corpus, run, monkeypatch
) -> None:
    run()
    before = keys(engine)
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)  # the store must stay writable, so no change of user here
    report = run()
    assert (report.files, report.removed, report.evicted) == (2, 0, 0)
    assert [bad.reason for bad in report.bad] == ["Permission denied"]
    assert keys(engine) == before


def test_a_byte_order_mark_is_no_text(engine: Engine, catalog: Catalog, corpus: Path, run) -> None:
    (corpus / "a.md").write_bytes(b"\xef\xbb\xbfHello there.")
    run()
    assert catalog.texts(str(corpus / "a.md")) == ["Hello there."]


def test_an_empty_file_among_others_is_fine(catalog: Catalog, corpus: Path, run) -> None:
    (corpus / "empty.md").write_text(" \n\n ")
    report = run()
    assert report.files == 4
    assert catalog.texts(str(corpus / "empty.md")) == []


def test_no_text_at_all_is_an_error(engine: Engine, catalog: Catalog, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(IngestError, match=r"holds no files to ingest \(\.htm, \.html, \.md, \.pdf, \.txt\)"):
        ingest(engine, folder, catalog)
    (folder / "a.txt").write_text("\n")
    with pytest.raises(IngestError, match="are empty"):
        ingest(engine, folder, catalog)


def test_an_empty_directory_does_not_empty_the_corpus(engine: Engine, catalog: Catalog, corpus: Path, run) -> None:
    run()
    before = keys(engine)
    for path in find_files(corpus)[0]:
        path.unlink()
    with pytest.raises(IngestError):
        run()
    assert keys(engine) == before


@pytest.mark.parametrize(("chunk_tokens", "error"), [(0, ConfigError), (-1, ConfigError), (100_000, ChunkTooLongError)])
def test_a_bad_chunk_size_is_an_error(run, corpus: Path, chunk_tokens: int, error: type[Exception]) -> None:
    (corpus / "a.md").write_text(prose(9, 2000))
    with pytest.raises(error):
        run(chunk_tokens=chunk_tokens)


def test_a_store_that_cannot_be_written_ends_it_and_it_goes_on_later(engine, catalog, corpus, run, tmp_path) -> None:
    chunks = tmp_path / "store" / "tmp"
    chunks.rename(tmp_path / "away")
    chunks.touch()
    with pytest.raises(StoreError):
        run()
    chunks.unlink()
    (tmp_path / "away").rename(chunks)
    assert run().files == 3
    assert_in_step(engine, catalog)
