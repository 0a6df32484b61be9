"""The picture of quality against budget: what is drawn, not how it looks."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib import image

from cacheblend_rag.diagnostics.quality_plot import QualityPanel, QualityPoint, plot_quality
from cacheblend_rag.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"

HKVD = [QualityPoint(0.5, 0.6, 0.5, 0.7), QualityPoint(0, 0, 0, 0), QualityPoint(1, 1, 1, 1)]
OTHER = [QualityPoint(0, 0, 0, 0), QualityPoint(0.25, 0.9, 0.8, 0.95), QualityPoint(1, 1, 1, 1)]


def lines(path: Path, colour: str) -> list[list[tuple[float, float]]]:
    """Corners of the lines of a colour inside the diagrams, in drawing order."""
    found = []
    for shape in ET.parse(path).iter(f"{SVG}path"):
        style = shape.get("style", "")
        if "fill: none" in style and f"stroke: {colour}" in style and "clip-path" in shape.attrib:
            numbers = [float(word) for word in shape.get("d", "").replace("\n", " ").split() if word not in "ML"]
            found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


def test_a_line_runs_through_its_points(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    plot_quality([QualityPanel("one", {"hkvd": HKVD})], path)
    ((start, middle, end),) = lines(path, "#0072b2")
    assert (middle[0] - start[0]) / (end[0] - start[0]) == pytest.approx(0.5, abs=1e-3)
    assert (middle[1] - start[1]) / (end[1] - start[1]) == pytest.approx(0.6, abs=1e-3)
    assert start[1] > end[1]  # down is larger in SVG: more closure is drawn higher


def test_a_policy_looks_the_same_in_all_panels(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    panels = [QualityPanel("$first$", {"hkvd": HKVD, "other": OTHER}), QualityPanel("second", {"other": OTHER})]
    plot_quality(panels, path)
    assert len(lines(path, "#0072b2")) == 1
    assert len(lines(path, "#d55e00")) == 2
    text = path.read_text()
    for wanted in ("$first$", "second", "hkvd", "other", "share of the gap to full prefill that is closed"):
        assert text.count(f"<!-- {wanted} -->") == 1


def test_a_png_grows_with_its_panels(tmp_path: Path) -> None:
    widths = []
    for count in (1, 3):
        plot_quality([QualityPanel(f"{n}", {"hkvd": HKVD}) for n in range(count)], tmp_path / "plot.PNG")
        widths.append(image.imread(tmp_path / "plot.PNG", format="png").shape[1])
    assert widths[1] > 2 * widths[0]


def test_bad_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        plot_quality([QualityPanel("one", {"hkvd": HKVD})], tmp_path / "plot.jpeg")
    with pytest.raises(ConfigError, match="at least one panel"):
        plot_quality([], tmp_path / "plot.svg")
    with pytest.raises(OSError):
        plot_quality([QualityPanel("one", {"hkvd": HKVD})], tmp_path / "nowhere" / "plot.svg")
