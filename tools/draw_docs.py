"""Draws the pictures of docs/how-it-works.md.

    python tools/draw_docs.py [DIRECTORY]

Each is an SVG file with a background of its own, so that it can be read on dark pages too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

INK = "#24292f"
PALE = "#d0d7de"
DROPPED = "#eaeef2"
REUSED = "#9ecbff"
COMPUTED = "#f5a66b"
CHUNKS = {"A": "#a7d8a3", "B": "#c6b6ee", "C": "#f3d88a"}


class Picture:
    """An SVG picture that things are put into.

    Args:
        width: Pixels.
        height: Pixels.
        title: What it shows, for those who can't see it.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            ' role="img" font-family="system-ui, sans-serif" font-size="13">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, text: str = "") -> None:
        """A rectangle, with a text in its middle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="#ffffff"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 4.5, text, anchor="middle")

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> None:
        """A line of text."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{INK}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line with a head, downwards."""
        self._parts.append(
            f'<path d="M{x1:g} {y1:g} L{x2:g} {y2 - 7:g}" stroke="{INK}" fill="none"/>'
            f'<path d="M{x2:g} {y2:g} l-4 -8 h8 z" fill="{INK}"/>'
        )

    def key(self, x: float, y: float, meanings: dict[str, str]) -> None:
        """What colours mean: names and fills, in a row."""
        for meaning, fill in meanings.items():
            self.box(x, y - 11, 14, 14, fill)
            self.text(x + 20, y, meaning)
            x += 50 + 6.6 * len(meaning)

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self._parts, "</svg>", ""])


def chunk_kv() -> Picture:
    """A chunk's KV: what is kept of one prefill."""
    picture = Picture(760, 280, "A chunk is prefilled behind a primer; of every layer its keys and values are kept")
    picture.text(20, 28, "At ingestion: each chunk is read once, alone, behind the primer", bold=True)
    primer, chunk, size, left, top = 5, 8, 40, 90, 60
    for layer in range(4):
        y = top + layer * 36
        picture.text(20, y + 20, f"layer {4 - layer}")
        for token in range(primer + chunk):
            fill = DROPPED if token < primer else REUSED
            picture.box(left + token * size, y, size, 32, fill, "" if token < primer else "K V")
    words = [*["·"] * primer, "The", "dam", "was", "built", "in", "the", "year", "1911"]
    for token, word in enumerate(words):
        picture.text(left + token * size + size / 2, top + 166, word, anchor="middle")
    below = top + 196
    picture.text(left + primer * size / 2, below, "primer: KV dropped", anchor="middle")
    picture.text(left + (primer + chunk / 2) * size, below, "chunk: KV kept", anchor="middle")
    right = left + (primer + chunk) * size + 24
    for line, text in enumerate(["one file:", "token ids,", "keys and values,", "checksum"]):
        picture.text(right, top + 50 + line * 20, text, bold=line == 0)
    return picture


def prompt() -> Picture:
    """What is computed of one prompt, by three ways of reading it."""
    picture = Picture(760, 330, "What full prefill, prefix caching and blending compute of a prompt of three chunks")
    picture.text(20, 28, "At query time: the same chunks, in another order, in any template", bold=True)
    pieces = [("system", 70, None), ("C", 150, "C"), ("", 14, None), ("A", 150, "A"), ("", 14, None), ("B", 150, "B")]
    pieces.append(("question", 76, None))
    left = 116
    strips = {
        "prompt": lambda name, chunk: CHUNKS.get(chunk or "", DROPPED),
        "full prefill": lambda name, chunk: COMPUTED,
        "prefix caching": lambda name, chunk: REUSED if name == "system" else COMPUTED,
        "CacheBlend": lambda name, chunk: REUSED if chunk else COMPUTED,
    }
    # What a policy chose, and a token at each edge of a chunk, which the text around it may split otherwise.
    chosen = {"C": (0.3, 0.34, 0.71), "A": (0.12, 0.55, 0.59, 0.83), "B": (0.22, 0.64)}
    for row, (name, fill) in enumerate(strips.items()):
        y = 56 + row * 56
        picture.text(20, y + 24, name)
        x = float(left)
        for text, width, chunk in pieces:
            picture.box(x, y, width, 38, fill(text, chunk), ("chunk " + text if chunk else text) if row == 0 else "")
            if name == "CacheBlend" and chunk:
                for place in (0.0, *chosen[chunk], 1 - 5 / width):
                    picture.box(x + place * width, y, 5, 38, COMPUTED)
            x += width
    picture.key(left, 304, {"computed now": COMPUTED, "KV from the store or a cache": REUSED})
    return picture


def shift() -> Picture:
    """Where a chunk's KV comes from and where it goes."""
    picture = Picture(760, 290, "Cached keys are rotated from the position they were computed at to the new one")
    picture.text(20, 28, "Shift: keys carry their position as a rotation (RoPE), values carry none", bold=True)
    size, stored, moved = 52, 236, 444
    picture.text(20, 78, "in the store, positions 228 …")
    picture.text(20, 226, "in the prompt, positions 912 …")
    for token in range(4):
        for row, name in enumerate("KV"):
            picture.box(stored + token * size, 52 + row * 30, size, 28, REUSED, f"{name}{228 + token}")
            fill = CHUNKS["B"] if name == "K" else REUSED
            picture.box(moved + token * size, 200 + row * 30, size, 28, fill, f"{name}{912 + token}")
    picture.arrow(stored + 2 * size, 114, moved + 2 * size, 196)
    picture.text(stored + 3 * size + 40, 140, "K: undo the rotation of 228, apply that of 912", anchor="start")
    picture.text(moved + 2 * size - 150, 182, "V: as it is", anchor="end")
    return picture


def recompute() -> Picture:
    """The rows of the fusing pass, and what each of them sees."""
    picture = Picture(760, 352, "Each recomputed token sees every key up to its own position, cached or fresh")
    picture.text(20, 28, "Recompute: one pass over the chosen and the missed tokens", bold=True)
    size, left, top = 26, 150, 84
    kinds = "mmrcrrcrrrcrmmm"
    fresh = [place for place, kind in enumerate(kinds) if kind != "r"]
    for place, kind in enumerate(kinds):
        picture.box(left + place * size, top - 24, size, 18, REUSED if kind == "r" else COMPUTED)
    picture.text(20, top - 10, "KV of the prompt")
    for row, place in enumerate(fresh):
        y = top + 6 + row * size
        what = "missed" if kinds[place] == "m" else "chosen"
        picture.text(left - 12, y + 18, f"{what}, position {place}", anchor="end")
        for seen, kind in enumerate(kinds):
            if seen <= place:
                picture.box(left + seen * size, y, size, size, REUSED if kind == "r" else COMPUTED)
            else:
                picture.box(left + seen * size, y, size, size, DROPPED)
    meanings = {"reads cached KV": REUSED, "reads fresh KV": COMPUTED, "comes later: not seen": DROPPED}
    picture.key(left, 332, meanings)
    return picture


DRAWN = {"chunk-kv": chunk_kv, "prompt": prompt, "shift": shift, "recompute": recompute}


def main() -> None:
    """Write all pictures."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    for name, draw in DRAWN.items():
        (directory / f"{name}.svg").write_text(draw().svg())


if __name__ == "__main__":
    main()
