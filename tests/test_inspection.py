"""What ``cacheblend inspect`` draws: figures that add up, and text that stays text."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag import ConfigError
from cacheblend_rag.diagnostics.inspection import Inspection
from cacheblend_rag.diagnostics.inspection_page import page, write_page
from cacheblend_rag.diagnostics.inspection_plot import plot_inspection
from cacheblend_rag.stats import BlendStats, Generation


def make(seed: int, matched: int, layers: int = 3, pieces: list[str] | None = None) -> Inspection:
    """Five tokens that are missed, the matched ones, and five more."""
    rng = np.random.default_rng(seed)
    positions = np.arange(5, 5 + matched)
    deviations = rng.exponential(size=(layers, matched)).astype(np.float32)
    deviations[0] = 0  # nothing came before the first layer
    is_recomputed = rng.random(matched) < 0.3
    chosen = int(is_recomputed.sum())
    stats = BlendStats(
        matched + 10, 0, matched - chosen, chosen, 10, segments=1, decision="blend", policy="query_aware"
    )
    answer = Generation("<an answer>", [1], "length", None, stats)
    pieces = pieces or [f"t{n} " for n in range(matched + 10)]
    return Inspection("models/one", answer, pieces, positions, deviations, is_recomputed, None)


@given(st.integers(0, 2**32), st.integers(1, 200))
def test_no_choice_holds_more_than_the_best_of_its_size(seed: int, matched: int) -> None:
    found = make(seed, matched)
    held, most = found.held
    assert 0 <= held <= most + 1e-9 <= 1 + 2e-9
    assert found.relative.mean() == pytest.approx(1, rel=1e-3)  # in units of the mean, the silent layer left out
    best = np.argsort(-found.relative)[: found.is_recomputed.sum()]
    ideal = np.zeros(matched, bool)
    ideal[best] = True
    of_best = Inspection(found.model, found.answer, found.pieces, found.positions, found.deviations, ideal, None)
    assert of_best.held == pytest.approx((most, most))


def test_layers_count_alike() -> None:
    found = make(1, 50)
    scaled = found.deviations * np.array([1, 1, 1e6], np.float32)[:, None]
    other = Inspection(found.model, found.answer, found.pieces, found.positions, scaled, found.is_recomputed, None)
    assert np.allclose(found.relative, other.relative, rtol=1e-3)


def test_where_nothing_deviates_nothing_is_held() -> None:
    found = make(1, 50)
    exact = Inspection(
        found.model, found.answer, found.pieces, found.positions, 0 * found.deviations, found.is_recomputed, None
    )
    assert exact.held == (0, 0)
    assert "NaN" not in page(exact) and "nan" not in page(exact)


def test_the_page_shows_every_token_and_only_as_text(tmp_path: Path) -> None:
    pieces = ["<script>", "alert(1)", "</script>", "&amp;", '"', *(f" t{n}" for n in range(55))]
    found = make(2, 50, pieces=pieces)
    text = page(found)
    tree = ElementTree.fromstring(re.sub(r"<script>\n.*?</script>", "", text, flags=re.S).replace(" checked>", "/>")
        .replace("<!doctype html>", "").replace('charset="utf-8">', 'charset="utf-8"/>')
        .replace('initial-scale=1">', 'initial-scale=1"/>'))  # fmt: skip
    (prompt,) = [one for one in tree.iter("div") if one.get("id") == "prompt"]
    assert "".join(prompt.itertext()) == "".join(pieces)
    kinds = [span.get("class") for span in prompt]
    assert kinds[:5] == kinds[-5:] == ["missed"] * 5
    assert [kind == "recomputed" for kind in kinds[5:-5]] == found.is_recomputed.tolist()
    bars = [bar for bar in tree.iter("rect")]
    for kind, count in (("recomputed", found.is_recomputed.sum()), ("reused", (~found.is_recomputed).sum())):
        told = [bar.find("title").text.split()[0] for bar in bars if bar.get("class") == kind]  # type: ignore[union-attr]
        assert sum(map(int, told)) == count
    write_page(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == text


@pytest.mark.parametrize("matched", [1, 2, 50, 3000])
def test_pictures_of_any_length(matched: int, tmp_path: Path) -> None:
    plot_inspection(make(3, matched), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plot_inspection(make(3, matched), tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()[:500]
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        plot_inspection(make(3, matched), tmp_path / "a.pdf")
