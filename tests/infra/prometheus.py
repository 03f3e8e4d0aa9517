"""A Prometheus with samples, or one that scrapes nodes, and its answers to the queries of panels."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

from tests.infra.clusters import free_port, wait_for
from tests.infra.manifests import INFRA
from tests.infra.sample_metrics import samples

SPAN_SECONDS = 30
"""`spanNulls` of the panels: longer gaps are not drawn. It is twice the time between scrapes of compose."""
MISSING = "prometheus is not installed, so no panel is evaluated (on Debian: apt-get install prometheus)"


def is_installed() -> bool:
    """Return whether the programs `prometheus` and `promtool` are on the PATH."""
    return shutil.which("prometheus") is not None and shutil.which("promtool") is not None


@dataclass(frozen=True)
class Window:
    """The time that a dashboard shows, and the distance of its points (s), which is that of the scrapes."""

    begin: float
    end: float
    step: int


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

    def get(self, path: str, **options: object) -> Any:
        """Return the data of an answer of its API."""
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

    def series(self, target: dict[str, Any], window: Window) -> list[Series]:
        """Evaluate a query of a panel over a window, with all values of the dashboard's variables."""
        expression = re.sub(r"\$(model|job_name)\b", ".*", target["expr"])
        # As Grafana computes it from the interval of scrapes.
        expression = expression.replace("$__rate_interval", f"{4 * window.step}s")
        options = {"start": window.begin, "end": window.end, "step": window.step}
        found = self.get("query_range", query=expression, **options)["result"]
        return [_named(target["legendFormat"], one, window.step) for one in found]


def _named(legend: str, found: dict[str, Any], step: int) -> Series:
    def label(name: re.Match[str]) -> str:
        return str(found["metric"].get(name[1], ""))

    times, values = [], []
    for at, value in found["values"]:
        if times and at - times[-1] > SPAN_SECONDS:
            times.append(times[-1] + step)
            values.append(math.nan)
        times.append(float(at))
        values.append(float(value))
    return Series(re.sub(r"\{\{(\w+)\}\}", label, legend), times, values)


@contextmanager
def with_samples() -> Iterator[Prometheus]:
    """Start a Prometheus that has the samples, and scrapes nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "samples.txt").write_text("".join(samples().lines()))
        blocks = [
            "promtool",
            "tsdb",
            "create-blocks-from",
            "openmetrics",
            folder / "samples.txt",
            folder / "data",
        ]
        subprocess.run(blocks, check=True, capture_output=True)
        with _running(folder, {"global": {}}) as started:
            yield started


@contextmanager
def scraping(addresses: Sequence[str], every: int) -> Iterator[Prometheus]:
    """Start a Prometheus that scrapes addresses each few seconds, and evaluates our alerts."""
    config = {
        "global": {"scrape_interval": f"{every}s", "evaluation_interval": f"{every}s"},
        "rule_files": [str(INFRA / "prometheus/rules.yaml")],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": list(addresses)}]}],
    }
    with tempfile.TemporaryDirectory() as name, _running(Path(name), config) as started:
        yield started


@contextmanager
def _running(folder: Path, config: dict[str, Any]) -> Iterator[Prometheus]:
    (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.json", f"--storage.tsdb.path={folder}/data"]
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
