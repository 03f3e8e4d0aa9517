"""Every panel shows an hour of sample metrics: a real Prometheus answers its queries, and it is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from tests.infra.dashboards import DASHBOARDS, draw, formatted, stacked
from tests.infra.exported import declared, named
from tests.infra.prometheus import MISSING, Prometheus, Series, Window, is_installed, with_samples
from tests.infra.sample_metrics import BEGIN, END, LOST, STEP, samples

HOUR = Window(BEGIN, END, STEP)

PANELS = {
    f"{name}: {panel['title']}, {panel['type']}": panel
    for name, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
}


@pytest.fixture(scope="module")
def source() -> Iterator[Prometheus]:
    if not is_installed():
        pytest.skip(MISSING)
    with with_samples() as started:
        yield started


def test_the_samples_are_metrics_that_are_exported():
    names = {name for name, _ in samples().values}
    shown = {metric for panel in PANELS.values() for one in panel["targets"] for metric in named(one["expr"])}
    assert names <= declared()
    assert shown <= names


@pytest.mark.parametrize("name", list(PANELS))
def test_every_query_of_a_panel_has_data_with_a_legend_and_a_unit(source, name):
    panel = PANELS[name]
    legends = []
    for target in panel["targets"]:
        found = source.series(target, HOUR)
        assert found, target["expr"]
        for one in found:
            assert one.legend.strip(" :")
            assert not math.isnan(one.last), one.legend
            assert formatted(one.last, panel["fieldConfig"]["defaults"]["unit"])
            legends.append(one.legend)
    assert len(set(legends)) == len(legends), "two lines have one legend"


@pytest.mark.parametrize(
    ("title", "legend"),
    [("Errors by code", "engine_died"), ("Retries", "llava: engine"), ("Retries", "ingress")],
)
def test_the_first_event_of_a_counter_is_shown(source, title, legend):
    panel = PANELS[f"endpoint: {title}, timeseries"]
    lines = [one for target in panel["targets"] for one in source.series(target, HOUR)]
    (line,) = (one for one in lines if one.legend == legend)
    assert max(line.values) > 0
    assert line.times[line.values.index(max(line.values))] == BEGIN + LOST[0]


@pytest.mark.parametrize("name", list(DASHBOARDS))
def test_a_dashboard_is_drawn(source, name, tmp_path):
    draw(name, source, HOUR).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 50_000


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 s"),
        (0.0123, "s", "12.3 ms"),
        (5400, "s", "1.5 hours"),
        (0.256, "percentunit", "25.6%"),
        (1060, "none", "1060"),
        (1060, "short", "1.06 K"),
        (7.5, "reqps", "7.5 req/s"),
        (1500, "rowsps", "1.5 K rows/s"),
        (28.1, "suffix:images/s", "28.1 images/s"),
        (math.nan, "s", "NaN"),
    ],
)
def test_values_are_written_with_their_unit(value, unit, text):
    assert formatted(value, unit) == text


def test_lines_are_stacked_and_a_gap_stays_a_gap():
    bands = stacked([Series("below", [0, 5, 10], [1, math.nan, 3]), Series("above", [5, 10], [2, 4])])
    assert [low for low, _ in bands] == [[0, 0, 0], [0, 3]]
    (first, last), (middle, top) = bands[0][1][::2], bands[1][1]
    assert (first, last, middle, top) == (1, 3, 2, 7)
    assert math.isnan(bands[0][1][1])
