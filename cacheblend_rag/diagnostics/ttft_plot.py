"""A picture of where the time to first token goes: full prefill against blend, question by question."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cacheblend_rag.diagnostics.pictures import FAINT, GRID, INK, check_picture_name, new_figure
from cacheblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cacheblend_rag.stats import BlendStats

_BAR_HEIGHT = 0.36
_BAR_OFFSET = 0.2
_LABEL_CHARACTERS = 32

# Field of BlendStats, its label, its colour: from Okabe and Ito's palette, which any colour vision tells apart.
_PARTS = (
    ("match", "match", "#CC79A7"),
    ("load", "load and shift", "#E69F00"),
    ("select", "select", "#009E73"),
    ("recompute", "recompute (all of the prompt in a full prefill)", "#0072B2"),
    ("first_token", "first token", "#56B4E9"),
)


@dataclasses.dataclass(frozen=True)
class TTFTPair:
    """One question, answered both ways.

    Attributes:
        label: What to call it, such as the question.
        full: With ``mode="off"``.
        blended: With a blend.
    """

    label: str
    full: BlendStats
    blended: BlendStats


def plot_ttft_parts(rows: Sequence[TTFTPair], path: str | os.PathLike[str]) -> None:
    """Draw a pair of stacked bars per question, full prefill above blend, the speed-up at its end.

    A bar's length is the sum of the measured parts; the time written beside it is the whole time to first token.

    Args:
        rows: Drawn top to bottom, at least one.
        path: Where to write; ``.png`` or ``.svg``.

    Raises:
        ConfigError: another suffix, or no rows.
        OSError: the file can't be written.
    """
    check_picture_name(path)
    if not rows:
        raise ConfigError("nothing to plot: give at least one pair of measurements")
    figure = new_figure(10, 1.7 + 0.75 * len(rows))
    axes = figure.add_subplot()
    for index, row in enumerate(rows):
        _draw_bar(axes, index - _BAR_OFFSET, row.full, "full prefill", FAINT)
        _draw_bar(axes, index + _BAR_OFFSET, row.blended, f"blend, {_compare(row)}", INK)
    _dress(axes, rows)
    figure.savefig(path, dpi=160)


def _draw_bar(axes: Axes, y: float, stats: BlendStats, name: str, colour: str) -> None:
    left = 0.0
    for field, _, part_colour in _PARTS:
        seconds = getattr(stats, field)
        axes.barh(y, seconds, _BAR_HEIGHT, left=left, color=part_colour, edgecolor="white", linewidth=0.5)
        left += seconds
    axes.annotate(
        f"{stats.ttft:#.3g} s  {name}",
        (left, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _compare(row: TTFTPair) -> str:
    ratio = row.full.ttft / row.blended.ttft
    return f"{ratio:.1f}\u00d7 faster" if ratio >= 1 else f"{1 / ratio:.1f}\u00d7 slower"


def _dress(axes: Axes, rows: Sequence[TTFTPair]) -> None:
    from matplotlib.patches import Patch

    labels = [textwrap.fill(row.label, _LABEL_CHARACTERS) for row in rows]
    axes.set_yticks(range(len(rows)), labels, color=INK, parse_math=False)  # a "$" in a question is a "$"
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT)
    longest = max(max(row.full.ttft, row.blended.ttft) for row in rows)
    axes.set_xlim(0, 1.35 * longest)  # room for the text at the bars' ends
    axes.set_xlabel("seconds to first token", color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    handles = [Patch(color=colour, label=label) for _, label, colour in _PARTS]
    axes.figure.legend(handles=handles, loc="outside upper center", ncols=len(_PARTS), frameon=False, fontsize=9)
