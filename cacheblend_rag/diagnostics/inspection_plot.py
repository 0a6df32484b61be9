"""A picture of one prompt: how far its tokens deviate, where, and which of them were recomputed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cacheblend_rag.diagnostics.inspection import SILENT
from cacheblend_rag.diagnostics.pictures import FAINT, GRID, INK, check_picture_name, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cacheblend_rag.diagnostics.inspection import Inspection

_RECOMPUTED, _REUSED = "#D55E00", "#56B4E9"  # of Okabe and Ito's palette
_BINS = 40
_COLUMNS = 600  # of the map: more could not be told apart


def plot_inspection(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Draw a histogram of squared deviations, and a map of them by layer and position.

    Args:
        inspection: The prompt.
        path: Where to write; ``.png`` or ``.svg``.

    Raises:
        ConfigError: another suffix.
        OSError: the file can't be written.
    """
    check_picture_name(path)
    figure = new_figure(11, 7.5)
    histogram, layers, chosen = figure.subplots(3, 1, height_ratios=[4, 5, 1])
    figure.suptitle(_title(inspection), color=INK, fontsize=11)
    _draw_histogram(histogram, inspection)
    edges = np.unique(np.linspace(0, len(inspection.positions), _COLUMNS + 1).astype(int))
    _draw_map(layers, inspection, edges)
    _draw_chosen(chosen, inspection, edges)
    for axes in (histogram, layers, chosen):
        axes.tick_params(colors=INK, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _title(inspection: Inspection) -> str:
    stats = inspection.answer.stats
    held, most = inspection.held
    matched = len(inspection.positions)
    return (
        f"{Path(inspection.model).name}: {stats.recomputed_tokens:,} of {matched:,} matched tokens recomputed by "
        f"{stats.policy or 'the ratio'}\nThey hold {held:.0%} of the deviation, as many could hold {most:.0%}"
    )


def _draw_histogram(axes: Axes, inspection: Inspection) -> None:
    squared = np.maximum(inspection.relative**2, 1e-6)
    logs = np.log10(squared)
    bins = np.linspace(logs.min(), max(logs.max(), logs.min() + 1e-3), _BINS)
    axes.hist(
        [logs[~inspection.is_recomputed], logs[inspection.is_recomputed]],
        bins=list(bins),
        stacked=True,
        color=[_REUSED, _RECOMPUTED],
        label=["reused", "recomputed"],
    )
    axes.set_xlabel("squared deviation of values, in units of the mean token's, powers of ten", color=INK, fontsize=9)
    axes.set_ylabel("tokens", color=INK, fontsize=9)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)


def _draw_map(axes: Axes, inspection: Inspection, edges: np.ndarray[Any, Any]) -> None:
    distances = np.sqrt(inspection.deviations)
    means = distances.mean(axis=1, keepdims=True)
    means[means <= SILENT * means.max(initial=0)] = np.inf  # rounding is no deviation
    by_column = np.maximum.reduceat(distances / means, edges[:-1], axis=1)
    axes.imshow(by_column, aspect="auto", origin="lower", cmap="OrRd", vmin=0, vmax=3, interpolation="nearest")
    axes.set_ylabel("layer", color=INK, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks(np.unique(np.linspace(0, len(distances) - 1, 7).astype(int)))
    axes.set_title(
        "by layer: the darker the farther, darkest from three times the layer's mean on", color=FAINT, fontsize=8
    )


def _draw_chosen(axes: Axes, inspection: Inspection, edges: np.ndarray[Any, Any]) -> None:
    shares = np.add.reduceat(inspection.is_recomputed.astype(float), edges[:-1]) / np.diff(edges)
    axes.bar(np.arange(len(shares)), shares, width=1.0, color=_RECOMPUTED)
    axes.set_xlim(-0.5, len(shares) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_ylabel("recomputed", color=INK, fontsize=9)
    ticks = np.linspace(0, len(shares) - 1, 8).astype(int)
    axes.set_xticks(ticks, [f"{inspection.positions[edges[tick]]:,}" for tick in ticks])
    axes.set_xlabel("position in the prompt", color=INK, fontsize=9)
