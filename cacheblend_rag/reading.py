"""From a file to its text: plain text, Markdown, HTML and PDF, by suffix.

The same bytes always give the same text, in every process, so a file that did not change keeps its chunks.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cacheblend_rag.errors import IngestError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup
    from bs4.element import PageElement, Tag

_INSTALL = "pip install 'cacheblend-rag[documents]'"

# What fonts and page layout leave in a text: control characters but for white space, soft hyphens, ligatures.
_UNPRINTED = dict.fromkeys([*range(0x09), *range(0x0E, 0x20), *range(0x7F, 0x85), *range(0x86, 0xA0), 0xAD])
_LIGATURES = dict(zip(range(0xFB00, 0xFB07), ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True))
_PRINTED: dict[int, str | None] = {**_UNPRINTED, **_LIGATURES}

# As in browsers: pages that declare the first are written in the second, which holds it.
_DECLARED_AND_MEANT = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
}

# Tags whose content is not shown, or not part of what a page says.
_LEFT_OUT = re.compile(
    "audio|canvas|datalist|iframe|nav|noscript|object|script|select|style|svg|template|textarea|title|video"
)
_DISPLAY_NONE = re.compile(r"(^|;)\s*display\s*:\s*none\b", re.IGNORECASE)
# Tags with a line of their own, and those with an empty line around them.
_LINE_TAGS = re.compile("address|br|caption|dd|div|dt|figcaption|footer|form|header|hr|legend|li|main|tr")
_PARAGRAPH_TAGS = re.compile(
    "article|aside|blockquote|body|details|dl|fieldset|figure|h[1-6]|ol|p|pre|section|summary|table|ul"
)
_LINE, _PARAGRAPH = "\n", "\n\n"


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, exactly as ``ingest`` splits it into chunks.

    ``.txt`` and ``.md`` are UTF-8 and taken as they are. Of ``.html`` and ``.htm`` it is what a browser shows without
    navigation, of ``.pdf`` the text layer, page by page; both with white space made regular.

    Raises:
        IngestError: the file can't be read, holds no text of the kind its suffix says, has another suffix, or the
            library for its kind is not installed; the message says which and what to do.
    """
    path = Path(path)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise IngestError(f"its name must end in {', '.join(SUFFIXES)}")
    return kind(_read_bytes(path))


def plain_text(data: bytes) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        IngestError: it is not UTF-8, or binary.
    """
    if b"\0" in data:
        raise IngestError("not text but binary (it holds zero bytes)")
    return _decode(data, "utf-8-sig", "UTF-8")


def html_text(data: bytes) -> str:
    """What a browser shows of an HTML page, without navigation: a line a block, an empty line between paragraphs.

    The encoding is that of the byte order mark, else the one the page declares, else UTF-8; it is never guessed.

    Raises:
        IngestError: it is not in that encoding, or nothing is shown, or BeautifulSoup is not installed.
    """
    try:
        from bs4 import BeautifulSoup, ParserRejectedMarkup, UnusualUsageWarning
    except ImportError as error:
        raise IngestError(f"HTML needs beautifulsoup4: {_INSTALL}") from error

    page = _decode_html(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusualUsageWarning)  # XHTML, or a page that looks like a file's name
            soup = BeautifulSoup(page, "html.parser")
    except ParserRejectedMarkup as error:
        raise IngestError(f"damaged HTML ({_one_line(error)}): repair it, or save the page again") from error
    text = _tidy("\n".join(_shown_lines(soup)))
    if not text:
        raise IngestError("HTML that shows no text: if scripts write it, save the page from a browser")
    return text


def pdf_text(data: bytes) -> str:
    """The text layer of a PDF, an empty line between pages.

    Raises:
        IngestError: it needs a password, has no text layer, is damaged, or pypdf is not installed.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, FileNotDecryptedError
    except ImportError as error:
        raise IngestError(f"PDF needs pypdf: {_INSTALL}") from error

    pages: list[str] = []
    try:
        for page in PdfReader(io.BytesIO(data)).pages:
            pages.append("\n".join(" ".join(line.split()) for line in _printed(page.extract_text()).splitlines()))
    except FileNotDecryptedError as error:
        raise IngestError("a PDF that needs a password: save it without one (qpdf --decrypt)") from error
    except DependencyError as error:
        raise IngestError(f"a PDF whose encryption needs a library ({_one_line(error)}): {_INSTALL}") from error
    except Exception as error:  # pypdf's documentation: broken files may cause any
        where = f"after page {len(pages)}, " if pages else ""
        raise IngestError(f"damaged PDF ({where}{_one_line(error)}): repair it, or save it again") from error
    text = _tidy("\n\n".join(pages))
    if not text:
        raise IngestError("a PDF without text (scanned?): run OCR over it first (ocrmypdf)")
    return text


_KINDS: dict[str, Callable[[bytes], str]] = {
    ".htm": html_text,
    ".html": html_text,
    ".md": plain_text,
    ".pdf": pdf_text,
    ".txt": plain_text,
}
SUFFIXES = tuple(_KINDS)


def _read_bytes(path: Path) -> bytes:
    try:
        str(path).encode()
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise IngestError("not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise IngestError(str(error.strerror)) from error
    except UnicodeEncodeError as error:
        raise IngestError("its name is not UTF-8") from error


def _decode(data: bytes, encoding: str, name: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise IngestError(f"not {name} text (byte 0x{data[error.start]:02x} at {error.start}): convert it") from error


def _decode_html(data: bytes) -> str:
    from bs4.dammit import EncodingDetector

    data, marked = EncodingDetector.strip_byte_order_mark(data)
    name = marked or EncodingDetector.find_declared_encoding(data, is_html=True) or "UTF-8"
    try:
        encoding = codecs.lookup(name).name
        if not marked and encoding.startswith(("utf-16", "utf-32")):
            encoding = name = "utf-8"  # a declaration that can be read as bytes is in neither
        page = _decode(data, _DECLARED_AND_MEANT.get(encoding, encoding), name)
    except (LookupError, ValueError) as error:
        raise IngestError(f"it declares the charset {name!r}, which can't be read: convert it to UTF-8") from error
    if "\0" in page:
        raise IngestError("not text but binary (it holds zero bytes)")
    return page


def _shown_lines(soup: BeautifulSoup) -> Iterator[str]:
    from bs4.element import NavigableString, PreformattedString, Tag

    line = ""
    # By hand and not recursively: nesting is as deep as the page likes. With each node, whether white space counts.
    todo: list[tuple[PageElement | str, bool]] = [(_PARAGRAPH, False), (soup, False)]
    while todo:
        node, verbatim = todo.pop()
        if isinstance(node, Tag):
            if not _is_shown(node):
                continue
            around, inside = _around(node.name), verbatim or node.name == "pre"
            todo.append((around, inside))
            todo += ((child, inside) for child in reversed(node.contents))
            todo.append((around, verbatim))
        elif isinstance(node, PreformattedString):  # a comment or declaration
            continue
        elif isinstance(node, NavigableString):
            text = _printed(node)
            if not verbatim:
                line += re.sub(r"\s+", " ", text)
                continue
            *whole, line = (line + text).split("\n")
            yield from whole
        elif node in (_LINE, _PARAGRAPH):
            shown = line if verbatim else " ".join(line.split())
            line = ""
            if shown.strip():
                yield shown
            if node == _PARAGRAPH:
                yield ""
        else:
            line += str(node)


def _is_shown(tag: Tag) -> bool:
    hidden = tag.has_attr("hidden") or _DISPLAY_NONE.search(str(tag.get("style", "")))
    return not hidden and not _LEFT_OUT.fullmatch(tag.name)


def _around(tag_name: str) -> str:
    """What stands before and after a tag's text."""
    if _PARAGRAPH_TAGS.fullmatch(tag_name):
        return _PARAGRAPH
    if _LINE_TAGS.fullmatch(tag_name):
        return _LINE
    return " " if tag_name in ("td", "th") else ""


def _printed(text: str) -> str:
    # Halves of a surrogate pair, which no tokenizer or database takes, are put together or replaced.
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\r\n", "\n").replace("\r", "\n").translate(_PRINTED)


def _tidy(text: str) -> str:
    """Without white space at the ends of lines; at most one empty line between two, none around."""
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
