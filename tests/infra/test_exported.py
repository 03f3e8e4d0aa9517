"""An endpoint and jobs that really run export every metric that dashboards and alerts name."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.infra.clusters import wait_for
from tests.infra.exported import declared, named
from tests.infra.manifests import INFRA
from tests.infra.sample_metrics import samples
from tests.infra.work import captioning, fine_tuning, images_of

os.environ.setdefault("RAY_metrics_report_interval_ms", "500")  # by default Ray exports every few seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
SCHEMA = {"name": "long", "schema": {"type": "string", "minLength": 350}}
LONG = {"max_tokens": 400, "response_format": {"type": "json_schema", "json_schema": SCHEMA}}
"""Options of a request whose answer has 350 characters."""


def wanted() -> set[str]:
    """All metrics that dashboards and alerts name."""
    rules = yaml.safe_load((INFRA / "prometheus/rules.yaml").read_text())["groups"]
    queries = [rule["expr"] for group in rules for rule in group["rules"]]
    for path in (INFRA / "grafana").glob("*.json"):
        panels = json.loads(path.read_text())["panels"]
        queries += [target["expr"] for panel in panels for target in panel["targets"]]
    return set().union(*map(named, queries))


class Scraped:
    """The names and labels of all metrics that the nodes of the local Ray have exported so far."""

    def __init__(self) -> None:
        self.labels: dict[str, set[str]] = defaultdict(set)

    @property
    def names(self) -> set[str]:
        return set(self.labels)

    def scrape(self) -> None:
        import ray

        for node in ray.nodes():
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
                lines = response.read().decode().splitlines()
                for line in lines:
                    if line.startswith("ray_skip"):
                        self.labels[re.split(r"[{ ]", line)[0]].update(re.findall(r'(\w+)="', line))

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Scrape every half second in a thread, as gauges leave with their process."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.5):
                self.scrape()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def test_endpoint_and_jobs_export_what_dashboards_and_alerts_name(
    local_ray, tiny_model, shapes_data, tmp_path
):
    scraped = Scraped()
    with scraped.meanwhile():
        fine_tune(tiny_model, shapes_data, tmp_path)
        caption(tiny_model, shapes_data, tmp_path)
        serve(tiny_model, scraped)
    assert wanted() - scraped.names == set()
    assert scraped.names <= declared()
    # The dashboards are drawn with samples: these have no label that is not exported.
    for name, labels in samples().values:
        assert {label for label, _ in labels} <= scraped.labels[name], name


def fine_tune(model: Path, data: Path, storage: Path) -> None:
    from pipelines.finetune.config import FinetuneConfig
    from pipelines.finetune.job import run_finetune

    training = {"max_steps": 40, "batch_size": 2}
    settings = fine_tuning(storage, model, data, training=training, scaling={"cpus_per_worker": 1})
    run_finetune(FinetuneConfig.model_validate(settings))


def caption(model: Path, data: Path, storage: Path) -> None:
    from pipelines.caption.config import CaptionConfig
    from pipelines.caption.job import run_caption

    images = [*images_of(data), Path("/none.png")]
    settings = captioning(
        *(storage, model, images, len(images)),
        sampling={"max_new_tokens": 64},
        engine={"max_sequences": 2},
        scaling={"cpus_per_worker": 1},
    )
    run_caption(CaptionConfig.model_validate(settings))


def serve(model: Path, scraped: Scraped) -> None:
    """Deploy an endpoint, send requests, kill an engine and the ingress, and wait for the metrics."""
    from ray import serve as ray_serve

    from serve.app import build
    from serve.deploy import start

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start("127.0.0.1", port)
    scaling = {"cpus_per_engine": 0.5, "min_engines": 2, "max_engines": 2}
    skip = {"retained": 4, "skipped": 4}
    section = {"path": str(model), "name": "tiny", "skip": skip, "scaling": scaling}
    try:
        ray_serve.run(build({"models": [section]}), name="exported", route_prefix="/")
        assert post(port, "tiny") == 200
        assert post(port, "none") == 404
        kill_under_load(port, ":exported:engine-tiny", "ray_skipvision_retries_total", scraped)
        kill_under_load(port, ":exported:ingress", "ray_skipvision_front_retries_total", scraped)
        wait_for(lambda: not wanted() - scraped.names, 60)
    finally:
        ray_serve.shutdown()


def kill_under_load(port: int, title: str, counter: str, scraped: Scraped) -> None:
    """Kill a process that holds requests, which are then sent to another one, until that is counted."""
    for _ in range(5):
        with ThreadPoolExecutor() as clients:
            sent = [clients.submit(post, port, "tiny", **LONG) for _ in range(6)]
            time.sleep(0.7)  # so that they have arrived
            holding = [
                each
                for each in psutil.Process().children(recursive=True)
                if title in "".join(each.cmdline()[:1])
            ]
            holding[0].kill()
        assert {one.result() for one in sent} == {200}
        if wait_for(lambda: counter in scraped.names, 10):
            return


def post(port: int, model: str, **options: Any) -> int:
    image = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAA"
        "AElFTkSuQmCC"
    )
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "max_tokens": 4, "messages": messages, **options}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    try:
        return urllib.request.urlopen(request, timeout=240).status
    except urllib.error.HTTPError as error:
        return error.code
