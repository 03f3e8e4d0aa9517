"""The dashboards in the docs show work that really ran, and that a Prometheus scraped."""

from __future__ import annotations

import pytest

from benchmarks._endpoint import MODEL
from tests.infra.dashboards import DASHBOARDS, draw
from tests.infra.live import recording
from tests.infra.prometheus import MISSING, is_installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets of Ray
]


def test_every_panel_shows_work_that_ran(tmp_path):
    if not is_installed():
        pytest.skip(MISSING)
    with recording(rate=2, seconds=30, rows=90, steps=24) as made:
        for name, dashboard in DASHBOARDS.items():
            empty = [
                target["expr"]
                for panel in dashboard["panels"]
                for target in panel["targets"]
                if not made.source.series(target, made.windows[name])
            ]
            assert empty == []
            draw(name, made.source, made.windows[name]).savefig(tmp_path / f"{name}.png")
        groups = made.source.get("rules")["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
        # An engine was killed.
        fired = {"expr": 'ALERTS{alertstate="firing"}', "legendFormat": "{{alertname}} {{model}}"}
        alerts = [one.legend for one in made.source.series(fired, made.windows["endpoint"])]
        assert f"EndpointEnginesDie {MODEL}" in alerts
