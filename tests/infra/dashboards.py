"""Draw dashboards of infra/grafana with the answers of a Prometheus to their queries.

No Grafana is needed. Numbers and lines, which may be stacked, are drawn: our dashboards have no other panels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, MultipleLocator

from tests.infra.manifests import INFRA
from tests.infra.prometheus import Prometheus, Series, Window

DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((INFRA / "grafana").glob("*.json"))}

BACKGROUND, PANEL, TEXT, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e9a", "#2c3235"
COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#37872d")
NAMED = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c"}
"""Hexadecimal values of the colours that the panels name for their thresholds."""
WIDTH, ROW = 15.0, 0.42
"""Inches of the image, and of a row of Grafana's grid."""


def draw(name: str, source: Prometheus, window: Window) -> Figure:
    """Draw the panels of one dashboard into a figure."""
    dashboard = DASHBOARDS[name]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"]) + 1.5
    height = rows * ROW
    figure = Figure(figsize=(WIDTH, height), dpi=80, facecolor=BACKGROUND)
    figure.text(0.008, 1 - 0.75 / rows, dashboard["title"], color=TEXT, fontsize=14, va="center")
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        left, width = grid["x"] / 24, grid["w"] / 24
        bottom, tall = 1 - (grid["y"] + grid["h"] + 1.5) / rows, grid["h"] / rows
        frame = figure.add_axes(
            (left + 0.003, bottom + 0.006 * 10 / rows, width - 0.006, tall - 0.012 * 10 / rows)
        )
        frame.set(facecolor=PANEL, xticks=[], yticks=[])
        frame.spines[:].set_color(GRID)
        frame.text(
            *(0.012, 1 - 0.45 / grid["h"], panel["title"]),
            color=TEXT,
            fontsize=9.5,
            fontweight="bold",
            va="center",
            transform=frame.transAxes,
        )
        found = [one for target in panel["targets"] for one in source.series(target, window)]
        if not found:
            nothing = panel["fieldConfig"]["defaults"]["noValue"]
            frame.text(0.5, 0.45, nothing, color=FAINT, ha="center", transform=frame.transAxes)
        elif panel["type"] == "stat":
            _stat(frame, panel, found)
        else:
            _lines(figure, (left, bottom, width, tall), panel, found, window)
    return figure


def _stat(frame: Axes, panel: dict[str, Any], found: Sequence[Series]) -> None:
    """The last value, over the line that led to it."""
    field = panel["fieldConfig"]["defaults"]
    for number, one in enumerate(found):
        centre = (number + 0.5) / len(found)
        text = formatted(one.last, field["unit"], field.get("decimals"))
        frame.text(
            centre,
            0.5,
            text,
            color=_colour(one.last, field),
            fontsize=21,
            ha="center",
            va="center",
            transform=frame.transAxes,
        )
        if len(found) > 1:
            frame.text(
                centre, 0.22, one.legend, color=FAINT, fontsize=8.5, ha="center", transform=frame.transAxes
            )
    if len(found) == 1 and len(found[0].times) > 1:
        small = frame.inset_axes((0, 0, 1, 0.3))
        small.set_axis_off()
        colour = _colour(found[0].last, field)
        small.plot(found[0].times, found[0].values, color=colour, linewidth=1)
        small.fill_between(found[0].times, found[0].values, color=colour, alpha=0.15)
        top = max((value for value in found[0].values if not math.isnan(value)), default=1.0)
        small.set_ylim(0, max(top, 1e-9) * 1.1)


def _colour(value: float, field: dict[str, Any]) -> str:
    """The colour of the highest threshold that a value reaches."""
    steps = field.get("thresholds", {}).get("steps", [])
    reached = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return NAMED[reached[-1]] if reached else COLOURS[0]


def _lines(
    figure: Figure,
    place: tuple[float, ...],
    panel: dict[str, Any],
    found: Sequence[Series],
    window: Window,
) -> None:
    left, bottom, width, tall = place
    field = panel["fieldConfig"]["defaults"]
    custom, high = field["custom"], panel["gridPos"]["h"]
    axes = figure.add_axes(
        (left + 0.065, bottom + tall * 1.75 / high, width - 0.075, tall * (high - 2.9) / high),
        facecolor=PANEL,
    )
    bands = (
        stacked(found)
        if custom.get("stacking", {}).get("mode") == "normal"
        else [(0.0, one.values) for one in found]
    )
    for number, (one, (low, values)) in enumerate(zip(found, bands, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(one.times, values, color=colour, linewidth=1.4, label=one.legend)
        axes.fill_between(
            one.times, low, values, color=colour, alpha=custom["fillOpacity"] / 100, linewidth=0
        )
    axes.set_xlim(window.begin, window.end)
    top = field.get("max") or max(
        (value for line in axes.lines for value in line.get_ydata() if value == value), default=1.0
    )
    axes.set_ylim(field.get("min", 0), max(top, 1e-9) * (1 if "max" in field else 1.12))
    if "thresholdsStyle" in custom:
        for step in field["thresholds"]["steps"][1:]:
            axes.axhline(step["value"], color=NAMED[step["color"]], linewidth=1, linestyle="--")
    axes.yaxis.set_major_locator(_ticks(axes.get_ylim()[1], field["unit"]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: formatted(value, field["unit"], field.get("decimals")))
    )
    clock = "%H:%M" if window.end - window.begin > 180 else "%H:%M:%S"
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: datetime.fromtimestamp(value, UTC).strftime(clock))
    )
    axes.xaxis.set_major_locator(_ticks(window.end - window.begin, "s"))
    axes.tick_params(colors=FAINT, labelsize=7.5, length=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.08, -0.13),
        ncols=6,
        fontsize=8,
        frameon=False,
        labelcolor=TEXT,
        handlelength=1.2,
        columnspacing=1.4,
    )


def stacked(found: Sequence[Series]) -> list[tuple[list[float], list[float]]]:
    """Return the lower and the upper end of each series, on top of those before it. Gaps stay gaps."""
    base: dict[float, float] = {}
    bands = []
    for one in found:
        low = [base.get(at, 0.0) for at in one.times]
        high = [under + value for under, value in zip(low, one.values, strict=True)]
        base.update((at, value) for at, value in zip(one.times, high, strict=True) if not math.isnan(value))
        bands.append((low, high))
    return bands


def _ticks(top: float, unit: str) -> Locator:
    """About five ticks, at whole minutes or hours for times."""
    if unit == "s" and top > 60:
        steps = (15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400)
        return MultipleLocator(next((step for step in steps if top / step <= 6), 7 * 86_400))
    return MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """A value with its unit, about as Grafana writes it.

    Raises:
        KeyError: no dashboard has had this unit yet.
    """
    if math.isnan(value):
        return "NaN"
    if unit == "percentunit":
        return f"{_number(100 * value, decimals)}%"
    if unit == "s":
        size, short = next((one for one in _TIMES if abs(value) >= one[0]), (1.0, "s"))
        return f"{_number(value / size, decimals)} {short}"
    if unit.startswith("suffix:"):
        return f"{_number(value, decimals)} {unit.removeprefix('suffix:')}"
    suffix = {"none": "", "short": "", "reqps": " req/s", "rowsps": " rows/s"}[unit]
    sizes = ((1e9, " Bil"), (1e6, " Mil"), (1e3, " K")) if unit != "none" else ()
    size, short = next((one for one in sizes if abs(value) >= one[0]), (1.0, ""))
    return f"{_number(value / size, decimals)}{short}{suffix}"


_TIMES = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "mins"), (1.0, "s"), (1e-3, "ms"))


def _number(value: float, decimals: int | None) -> str:
    if decimals is None:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.{decimals}f}"
