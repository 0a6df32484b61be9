"""From files to text: HTML, PDF, plain text, and what is none of them."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pdfs import encrypted, pdf

from cacheblend_rag.errors import IngestError
from cacheblend_rag.reading import SUFFIXES, html_text, pdf_text, plain_text, read_text

logging.getLogger("pypdf").setLevel(logging.CRITICAL)


def is_tidy(text: str) -> bool:
    return text != "" and all(
        [
            text == text.strip("\n"),
            "\n\n\n" not in text,
            all(line == line.rstrip() for line in text.split("\n")),
            not set(text) & {chr(code) for code in (*range(9), *range(0x0E, 0x20), 0x7F, 0xAD)},
            text.encode().decode() == text,
        ]
    )


# PDF


def test_a_pdf_is_read_page_by_page_and_line_by_line() -> None:
    data = pdf("The Caf\u00e9 (old)\nhas   three  doors.", "", "Page \\ three.")
    assert pdf_text(data) == "The Caf\u00e9 (old)\nhas three doors.\n\nPage \\ three."


def test_what_fonts_leave_in_a_pdf_is_made_regular() -> None:
    glyphs = b"/Differences [65 /fi]"
    data = pdf("A").replace(b"/WinAnsiEncoding", b"<< /Type /Encoding %s >>" % glyphs)
    assert pdf_text(data) == "fi"
    assert pdf_text(pdf("so\u00adft\x01 hy\x00phen")) == "soft hyphen"
    table = (
        b"begincmap 1 begincodespacerange <00> <FF> endcodespacerange"
        b" 2 beginbfchar <41> <D835> <42> <D835DC00> endbfchar endcmap"
    )
    table = b"9 0 obj\n<< /Length %d >>\nstream\n%s\nendstream\nendobj\n" % (len(table), table)
    data = pdf("AB").replace(b"/Helvetica", b"/Helvetica /ToUnicode 9 0 R").replace(b"xref\n", table + b"xref\n", 1)
    assert pdf_text(data) == "\ufffd\U0001d400"  # half a surrogate pair, and a whole one


words = st.text(st.characters(codec="cp1252", categories=("L", "N", "P")).filter(lambda c: c != "\u00ad"), min_size=1)


@settings(max_examples=40)
@given(pages=st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_pdf_gives_its_words_whatever_they_are(pages: list[list[str]]) -> None:
    read = pdf_text(pdf(*("  ".join(page) for page in pages)))
    assert read == "\n\n".join(" ".join(page) for page in pages)


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_a_pdf_that_is_only_protected_from_changes_is_read(algorithm: str) -> None:
    assert pdf_text(encrypted(pdf("Open."), "", algorithm)) == "Open."
    with pytest.raises(IngestError, match=r"needs a password: save it without one \(qpdf --decrypt\)"):
        pdf_text(encrypted(pdf("Closed."), "secret", algorithm))


@pytest.mark.parametrize("data", [pdf(), pdf(""), pdf(" ", "\n")], ids=["no pages", "one page", "white space"])
def test_a_pdf_without_text_is_told(data: bytes) -> None:
    with pytest.raises(IngestError, match=r"a PDF without text \(scanned\?\): run OCR over it first"):
        pdf_text(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Cannot read an empty file"),
        (b"<html>no PDF</html>", "Stream has ended unexpectedly"),
        (pdf("x" * 99)[:300], "Stream has ended unexpectedly"),
        (pdf("one", "two").replace(b"7 0 obj\n<<", b"7 0 obj\n<< /Filter /None"), "after page 1, "),
    ],
)
def test_a_damaged_pdf_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(IngestError, match=rf"damaged PDF \({reason}.*\): repair it, or save it again$"):
        pdf_text(data)


@settings(max_examples=100)
@given(data=st.data())
def test_no_damage_to_a_pdf_is_another_error(data: st.DataObject) -> None:
    whole = bytearray(pdf("Some text.", "More."))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=12)):
        whole[place] = data.draw(st.integers(0, 255))
    try:
        text = pdf_text(bytes(whole))
    except IngestError as error:
        assert "\n" not in str(error)
    else:
        assert is_tidy(text)


# HTML


def html(body: str) -> str:
    return html_text(body.encode())


def test_html_is_what_a_browser_shows_without_navigation() -> None:
    page = """<?xml version="1.0"?><!DOCTYPE html><html><head><title>Tab</title><style>p {}</style>
        <script>var x = "<p>no</p>";</script><body><nav><ul><li>Home</ul></nav><template><p>no</p></template>
        <!-- no --><h1>The   bridge</h1><p>Built in <b>13</b>42&nbsp;by&#10;the&amp;so.<p>Second.<br>Line.
        <p hidden>no</p><div style="color: red; display:none">no</div><ul><li>one<li>two</ul><noscript>no</noscript>
        <table><tr><th>a<th>b</tr><tr><td>1</td><td>2</td></tr></table><svg><text>no</text></svg>end</body></html>"""
    assert html(page) == ("The bridge\n\nBuilt in 1342 by the&so.\n\nSecond.\nLine.\n\none\ntwo\n\na b\n1 2\n\nend")


def test_white_space_counts_in_preformatted_text_only() -> None:
    page = "<div>a\n  b</div><pre><code>if x:\n    <i>y</i>  = 1\n\n\n\nz<br>\tw  \n</code></pre> c"
    assert html(page) == "a b\n\nif x:\n    y  = 1\n\nz\n\tw\n\nc"


blocks = st.lists(
    st.tuples(st.sampled_from(["p", "h2", "li", "div", "blockquote", "td"]), st.lists(words, min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60)
@given(blocks=blocks, space=st.sampled_from([" ", "\n", "\t ", "\r\n\f", " <!-- c -->\n"]))
def test_html_keeps_every_word_and_its_white_space_does_not_matter(blocks, space: str) -> None:
    def page(between: str) -> str:
        escaped = ((tag, [w.replace("&", "&amp;").replace("<", "&lt;") for w in found]) for tag, found in blocks)
        return between.join(f"<{tag}>{between}{between.join(found)}{between}</{tag}>" for tag, found in escaped)

    text = html(page(space))
    assert text.split() == [word for _, found in blocks for word in found]
    assert text == html(page(" "))
    assert is_tidy(text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "windows-1252", "iso-8859-1", "gb2312"])
def test_the_declared_charset_is_honoured(encoding: str) -> None:
    shown = "\u4e2d\u6587" if encoding == "gb2312" else "caf\u00e9 \u201cquoted\u201d"
    written = "windows-1252" if encoding == "iso-8859-1" else encoding  # as in browsers
    declared = "" if encoding.startswith("utf") else f'<meta charset="{encoding}">'
    assert html_text(f"<html>{declared}<p>{shown}".encode(written)) == shown
    http = f'<meta http-equiv="Content-Type" content="text/html; charset={encoding}">'
    if declared:
        assert html_text(f"<html>{http}<p>{shown}".encode(written)) == shown


def test_a_page_that_declares_utf16_and_can_be_read_is_utf8() -> None:
    assert html('<meta charset="utf-16"><p>caf\u00e9') == "caf\u00e9"


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (b"", "HTML that shows no text: "),
        (b"<html><title>Tab</title><body><script>write()</script> &nbsp;</body>", "HTML that shows no text: "),
        ("<p>caf\u00e9".encode("latin-1"), r"not UTF-8 text \(byte 0xe9 at 6\): convert it$"),
        ('<meta charset="utf-8"><p>caf\u00e9'.encode("latin-1"), r"not utf-8 text \(byte 0xe9 at 28\): convert it$"),
        (b'<meta charset="klingon"><p>x', "it declares the charset 'klingon', which can't be read: convert it"),
        (b'<meta charset="hex"><p>x', "it declares the charset 'hex', which can't be read: convert it"),
        (b"\x89PNG\r\n\0\0", "not UTF-8 text"),
        (b"a\0b", "not text but binary"),
    ],
)
def test_bad_html_is_told(page: bytes, reason: str) -> None:
    with pytest.raises(IngestError, match=reason):
        html_text(page)


def test_html_may_be_nested_as_deep_as_it_likes() -> None:
    assert html("<div><i>" * 20_000 + "deep") == "deep"


@settings(max_examples=150)
@given(st.one_of(st.binary(max_size=80), st.text("<>!-/[]&#;apre= \n\"'\ud800\x01", max_size=80)))
def test_no_markup_is_another_error(page: bytes | str) -> None:
    try:
        text = html_text(page if isinstance(page, bytes) else page.encode("utf-8", "surrogatepass"))
    except IngestError as error:
        assert "\n" not in str(error)
    else:
        assert is_tidy(text)


# Plain text and files


def test_plain_text_is_taken_as_it_is() -> None:
    assert plain_text(b"\xef\xbb\xbf a \r\n\n\n\nb ") == " a \r\n\n\n\nb "


def test_the_suffix_says_how_a_file_is_read(tmp_path: Path) -> None:
    assert set(SUFFIXES) == {".txt", ".md", ".html", ".htm", ".pdf"}
    contents = {"a.txt": b"<p>a", "b.MD": b"<p>b", "c.HTML": b"<p>c", "d.Htm": b"<p>d", "e.PDF": pdf("e")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert [read_text(tmp_path / name) for name in contents] == ["<p>a", "<p>b", "c", "d", "e"]
    assert read_text(str(tmp_path / "a.txt")) == "<p>a"
    with pytest.raises(IngestError, match=r"its name must end in \.htm, \.html, \.md, \.pdf, \.txt"):
        read_text(tmp_path / "f.docx")


def test_every_process_reads_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("One  line\nand two.", "More."))
    (tmp_path / "b.html").write_text("<h1>One</h1><ul><li>two<li>three</ul>")
    program = "import sys; from cacheblend_rag.reading import read_text; print([read_text(a) for a in sys.argv[1:]])"
    command = [sys.executable, "-c", program, str(tmp_path / "a.pdf"), str(tmp_path / "b.html")]
    runs = [
        subprocess.run(command, env={"PYTHONHASHSEED": seed, "LC_ALL": locale}, capture_output=True, check=True).stdout
        for seed, locale in (("1", "C"), ("2", "C.UTF-8"))
    ]
    assert runs[0] == runs[1] == b"['One line\\nand two.\\n\\nMore.', 'One\\n\\ntwo\\nthree']\n"


@pytest.mark.parametrize(
    ("module", "read", "data", "needs"),
    [("pypdf", pdf_text, pdf("a"), "PDF needs pypdf"), ("bs4", html_text, b"<p>a", "HTML needs beautifulsoup4")],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, module, read, data, needs) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(IngestError, match=rf"^{needs}: pip install 'cacheblend-rag\[documents\]'$"):
        read(data)
