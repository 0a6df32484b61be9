"""The picture of the time to first token: what is drawn, not how it looks."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib import image

from cacheblend_rag.diagnostics.ttft_plot import TTFTPair, plot_ttft_parts
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.stats import BlendStats

SVG = "{http://www.w3.org/2000/svg}"


def stats(match: float, load: float, select: float, recompute: float, first_token: float) -> BlendStats:
    parts = {"match": match, "load": load, "select": select, "recompute": recompute, "first_token": first_token}
    return BlendStats(prompt_tokens=1000, ttft=sum(parts.values()), **parts)


FULL, BLENDED = stats(0.01, 0, 0, 1.2, 0.04), stats(0.01, 0.05, 0.15, 0.25, 0.04)


def bar_widths(path: Path, colour: str) -> list[float]:
    """Widths of the rectangles of a colour, legend excluded, in drawing order."""
    widths = []
    for shape in ET.parse(path).iter(f"{SVG}path"):
        if f"fill: {colour}" in shape.get("style", "") and "clip-path" in shape.attrib:
            xs = [float(word) for word in shape.get("d", "").replace("\n", " ").split() if word not in "MLzZ"][::2]
            widths.append(max(xs) - min(xs))
    return widths


def test_the_bars_are_as_long_as_the_parts(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    plot_ttft_parts([TTFTPair("one", FULL, BLENDED)], path)
    recompute = bar_widths(path, "#0072b2")
    assert len(recompute) == 2
    assert recompute[0] / recompute[1] == pytest.approx(1.2 / 0.25, rel=1e-3)
    (_, select) = bar_widths(path, "#009e73")
    assert recompute[1] / select == pytest.approx(0.25 / 0.15, rel=1e-3)


def test_labels_and_speed_ups_are_written(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    plot_ttft_parts([TTFTPair("Why $x$ & <y>?", FULL, BLENDED), TTFTPair("other", BLENDED, FULL)], path)
    text = path.read_text()
    for wanted in ("1.25 s  full prefill", "0.500 s  blend, 2.5\u00d7 faster", "1.25 s  blend, 2.5\u00d7 slower"):
        assert f"<!-- {wanted} -->" in text
    assert "Why $x$" in text
    for part in ("match", "load and shift", "select", "recompute", "first token"):
        assert f"<!-- {part}" in text


def test_a_png_grows_with_its_rows(tmp_path: Path) -> None:
    heights = []
    for rows in (1, 8):
        plot_ttft_parts([TTFTPair(f"question {row}", FULL, BLENDED) for row in range(rows)], tmp_path / "plot.PNG")
        heights.append(image.imread(tmp_path / "plot.PNG", format="png").shape[0])
    assert heights[1] > 3 * heights[0] / 2


def test_bad_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        plot_ttft_parts([TTFTPair("one", FULL, BLENDED)], tmp_path / "plot.jpeg")
    with pytest.raises(ConfigError, match="at least one pair"):
        plot_ttft_parts([], tmp_path / "plot.svg")
    with pytest.raises(OSError):
        plot_ttft_parts([TTFTPair("one", FULL, BLENDED)], tmp_path / "nowhere" / "plot.svg")
