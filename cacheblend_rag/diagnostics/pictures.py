"""What the pictures have in common."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cacheblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#222222"
FAINT = "#8A8A8A"
GRID = "#E6E6E6"

_SUFFIXES = (".png", ".svg")


def check_picture_name(path: str | os.PathLike[str]) -> None:
    """Check what a picture is to be called.

    Raises:
        ConfigError: it is of a kind that isn't written.
    """
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"the picture's name must end in {' or '.join(_SUFFIXES)}, not {os.fspath(path)!r}")


def check_matplotlib() -> None:
    """Check that pictures can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install 'cacheblend-rag[plot]'")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its sides in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
