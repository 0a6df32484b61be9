"""A picture of quality against budget: how much of the gap to full prefill each policy closes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cacheblend_rag.diagnostics.pictures import FAINT, GRID, INK, check_picture_name, new_figure
from cacheblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which any colour vision tells apart; a marker each for print without colour.
_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)


@dataclasses.dataclass(frozen=True)
class QualityPoint:
    """What a policy achieves with a budget.

    Attributes:
        budget: Share of the matched tokens that are recomputed.
        closure: Share of the gap between full reuse (0) and full prefill (1) that is closed.
        low: Lower end of its interval.
        high: Upper end.
    """

    budget: float
    closure: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class QualityPanel:
    """One diagram.

    Attributes:
        title: What was measured.
        lines: Points by the policy's name, in any order.
    """

    title: str
    lines: Mapping[str, Sequence[QualityPoint]]


def plot_quality(panels: Sequence[QualityPanel], path: str | os.PathLike[str]) -> None:
    """Draw diagrams side by side: one line a policy, its intervals shaded.

    Args:
        panels: Left to right, at least one. A policy looks the same in all.
        path: Where to write; ``.png`` or ``.svg``.

    Raises:
        ConfigError: another suffix, or no panels.
        OSError: the file can't be written.
    """
    check_picture_name(path)
    if not panels:
        raise ConfigError("nothing to plot: give at least one panel")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    styles = {name: _STYLES[n % len(_STYLES)] for n, name in enumerate(names)}
    figure = new_figure(1 + 4.6 * len(panels), 4.6)
    diagrams = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(diagrams, panels, strict=True):
        for name, points in panel.lines.items():
            _draw_line(axes, name, points, *styles[name])
        _dress(axes, panel.title)
    diagrams[0].set_ylabel("share of the gap to full prefill that is closed", color=INK)
    handles = {
        label: handle for axes in diagrams for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _draw_line(axes: Axes, name: str, points: Sequence[QualityPoint], colour: str, marker: str) -> None:
    ordered = sorted(points, key=lambda point: point.budget)
    budgets = [100 * point.budget for point in ordered]
    axes.plot(budgets, [point.closure for point in ordered], color=colour, marker=marker, markersize=5, label=name)
    lows, highs = [point.low for point in ordered], [point.high for point in ordered]
    axes.fill_between(budgets, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK, parse_math=False)
    axes.set_xlabel("% of the matched tokens recomputed", color=INK)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.axhline(1, color=FAINT, linewidth=0.8)
    axes.tick_params(colors=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
