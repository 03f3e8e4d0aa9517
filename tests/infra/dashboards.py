"""Draw the dashboards for the docs, with the answers of a real Prometheus to their queries:

python -m tests.infra.dashboards -o docs/images

It needs `prometheus` and `promtool`, but no Grafana. It draws numbers and lines, which may be stacked, as our
dashboards have no other panels. The data is that of `sample_metrics`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, MultipleLocator

from tests.infra.clusters import free_port, wait_for
from tests.infra.manifests import INFRA
from tests.infra.sample_metrics import BEGIN, END, STEP, samples

DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((INFRA / "grafana").glob("*.json"))}
MISSING = "prometheus is not installed, so no panel is evaluated (on Debian: apt-get install prometheus)"

BACKGROUND, PANEL, TEXT, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e9a", "#2c3235"
COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#37872d")
WIDTH, ROW = 15.0, 0.42
"""Inches of the image, and of a row of Grafana's grid."""


@dataclass(frozen=True)
class Series:
    """A line of a panel: its legend, times (s) and values."""

    legend: str
    times: list[float]
    values: list[float]

    @property
    def last(self) -> float:
        """The last value that is a number, as Grafana's `lastNotNull`."""
        return next((value for value in reversed(self.values) if not math.isnan(value)), math.nan)


class Prometheus:
    """A running Prometheus, and the answers to the queries of panels."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _get(self, path: str, **options: object) -> Any:
        query = urllib.parse.urlencode(options, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{options}: {error.read().decode()}") from error

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).status == 200
        except OSError:
            return False

    def series(self, target: dict[str, Any]) -> list[Series]:
        """Evaluate a query of a panel over the hour, with all values of the dashboard's variables."""
        expression = re.sub(r"\$(model|job_name)\b", ".*", target["expr"])
        expression = expression.replace("$__rate_interval", f"{4 * STEP}s")  # as Grafana computes it
        found = self._get("query_range", query=expression, start=BEGIN, end=END, step=STEP)["result"]
        return [self._named(target["legendFormat"], one) for one in found]

    @staticmethod
    def _named(legend: str, found: dict[str, Any]) -> Series:
        def label(name: re.Match[str]) -> str:
            return str(found["metric"].get(name[1], ""))

        times, values = [], []
        for at, value in found["values"]:
            if times and at - times[-1] > 60:  # `spanNulls` of the panels: longer gaps are not drawn
                times.append(times[-1] + STEP)
                values.append(math.nan)
            times.append(float(at))
            values.append(float(value))
        return Series(re.sub(r"\{\{(\w+)\}\}", label, legend), times, values)


@contextmanager
def prometheus() -> Iterator[Prometheus]:
    """Start a Prometheus that has the samples, and scrapes nothing.

    Raises:
        SystemExit: it is not installed.
    """
    binary, promtool = shutil.which("prometheus"), shutil.which("promtool")
    if binary is None or promtool is None:
        raise SystemExit(MISSING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, data = folder / "samples.txt", folder / "data"
        text.write_text("".join(samples().lines()))
        blocks = [promtool, "tsdb", "create-blocks-from", "openmetrics", text, data]
        subprocess.run(blocks, check=True, capture_output=True)
        (folder / "prometheus.yaml").write_text("global: {}\n")
        address = f"127.0.0.1:{free_port()}"
        command = [binary, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={data}"]
        command += ["--storage.tsdb.retention.time=100y", f"--web.listen-address={address}"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        started = Prometheus(f"http://{address}")
        try:
            assert wait_for(started.ready, 60), (folder / "log").read_text()
            yield started
        finally:
            process.terminate()
            process.wait(30)


# --------------------------------------------------------------------------------------------- drawing


def draw(name: str, source: Prometheus) -> Figure:
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
        found = [one for target in panel["targets"] for one in source.series(target)]
        if not found:
            frame.text(0.5, 0.45, "No data", color=FAINT, ha="center", transform=frame.transAxes)
        elif panel["type"] == "stat":
            _stat(frame, panel, found)
        else:
            _lines(figure, (left, bottom, width, tall), panel, found)
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
            color=COLOURS[0],
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
        small.plot(found[0].times, found[0].values, color=COLOURS[0], linewidth=1)
        small.fill_between(found[0].times, found[0].values, color=COLOURS[0], alpha=0.15)
        top = max((value for value in found[0].values if not math.isnan(value)), default=1.0)
        small.set_ylim(0, max(top, 1e-9) * 1.1)


def _lines(figure: Figure, place: tuple[float, ...], panel: dict[str, Any], found: Sequence[Series]) -> None:
    left, bottom, width, tall = place
    field = panel["fieldConfig"]["defaults"]
    custom, high = field["custom"], panel["gridPos"]["h"]
    axes = figure.add_axes(
        (left + 0.05, bottom + tall * 1.75 / high, width - 0.06, tall * (high - 2.9) / high), facecolor=PANEL
    )
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    base: dict[float, float] = {}
    for number, one in enumerate(found):
        colour, low, values = COLOURS[number % len(COLOURS)], [0.0] * len(one.times), one.values
        if stacked:
            low = [base.get(at, 0.0) for at in one.times]
            values = [0.0 if math.isnan(value) else value for value in one.values]
            values = [under + value for under, value in zip(low, values, strict=True)]
            base.update(zip(one.times, values, strict=True))
        axes.plot(one.times, values, color=colour, linewidth=1.4, label=one.legend)
        axes.fill_between(
            one.times, low, values, color=colour, alpha=custom["fillOpacity"] / 100, linewidth=0
        )
    axes.set_xlim(BEGIN, END)
    top = field.get("max") or max(
        (value for line in axes.lines for value in line.get_ydata() if value == value), default=1.0
    )
    axes.set_ylim(field.get("min", 0), max(top, 1e-9) * (1 if "max" in field else 1.12))
    axes.yaxis.set_major_locator(_ticks(axes.get_ylim()[1], field["unit"]))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: formatted(value, field["unit"], field.get("decimals")))
    )
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{datetime.fromtimestamp(value, UTC):%H:%M}")
    )
    axes.xaxis.set_major_locator(MultipleLocator(600))
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
    suffix = {"none": "", "short": "", "reqps": " req/s"}[unit]
    sizes = ((1e9, " Bil"), (1e6, " Mil"), (1e3, " K")) if unit != "none" else ()
    size, short = next((one for one in sizes if abs(value) >= one[0]), (1.0, ""))
    return f"{_number(value / size, decimals)}{short}{suffix}"


_TIMES = ((86_400.0, "days"), (3_600.0, "hours"), (60.0, "mins"), (1.0, "s"), (1e-3, "ms"))


def _number(value: float, decimals: int | None) -> str:
    if decimals is None:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.{decimals}f}"


def main() -> None:
    """Draw all dashboards of infra/grafana into image files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the images")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with prometheus() as source:
        for name in DASHBOARDS:
            path = options.output / f"dashboard_{name}.png"
            draw(name, source).savefig(path)
            print(path)


if __name__ == "__main__":
    main()
