"""Figures of results: matplotlib without pyplot, so that no global state or backend is touched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SKIP_COLOUR = "#e07b26"
"""Orange, for Skip-Vision and for what stands out."""

FULL_COLOUR = "#5b6b7f"
"""Grey blue, for full tokens and for what recedes."""


def subplots(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], **more: Any
) -> tuple[Figure, Any]:
    """Return a figure of ``size`` inches and its axes; ``more`` goes to `Figure.subplots` of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **more)


def hide_box(axis: Axes) -> None:
    """Keep only the left and the bottom line around a plot."""
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure in the format of the path's suffix."""
    figure.savefig(path, dpi=dpi)
