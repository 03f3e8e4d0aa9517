"""Draw the dashboards of an endpoint and of jobs that really run, from what a Prometheus scraped meanwhile:

python -m tests.infra.live -o docs/images

The demo's model answers requests on two engines. One of them is killed, later an ingress, and then a burst of
requests exceeds the queues. After that, two jobs caption images, some of which are missing or unreadable, and
one fine-tunes and loses its worker. All that takes about a quarter of an hour on two CPUs. It needs
`prometheus`, but no Grafana.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import _endpoint
from benchmarks._endpoint import MODEL, Endpoint, local_endpoint
from benchmarks.serve_faults import killing
from pipelines.shapes.files import ShapesConfig, write_shapes
from tests.infra.clusters import Jobs, rays_folder, result
from tests.infra.dashboards import DASHBOARDS, draw
from tests.infra.manifests import INFRA
from tests.infra.prometheus import MISSING, Prometheus, Window, is_installed, scraping
from tests.infra.work import captioning, fine_tuning, images_of

EVERY = 5
"""Seconds from one scrape to the next."""
METRICS = {"endpoint": "engine", "batch": "batch", "training": "training"}
"""The beginnings of the names of metrics, by the dashboard that shows them."""
ENVIRONMENT = {
    "RAY_metrics_report_interval_ms": "1000",
    # A busy machine may be slow to start a proxy.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}
MODEL_FOLDER = INFRA.parent / "models" / MODEL


class Recording:
    """Real work under a Prometheus.

    Attributes:
        source: the Prometheus that scraped the work.
        windows: the time of the work that each dashboard shows.
    """

    def __init__(self, source: Prometheus, folder: Path) -> None:
        import ray

        self.source, self.folder = source, folder
        self.windows: dict[str, Window] = {}
        self.jobs = Jobs(ray.get_runtime_context().gcs_address, folder)
        self.data = folder / "shapes"
        write_shapes(ShapesConfig(output=self.data, train=400, validation=1, test=40))

    @contextmanager
    def of(self, dashboard: str) -> Iterator[None]:
        """Record the work in the block as the window of a dashboard."""
        begin = time.time()
        yield
        time.sleep(EVERY)  # for the last scrape
        self.windows[dashboard] = self._trimmed(METRICS[dashboard], Window(begin, time.time(), EVERY))

    def _trimmed(self, metrics: str, window: Window) -> Window:
        """Return the window without its ends, in which processes start or stop and export no metrics."""
        query = {"expr": f'count({{__name__=~"ray_skipvision_{metrics}_.+"}})', "legendFormat": ""}
        (found,) = self.source.series(query, window)
        return replace(window, begin=found.times[0] - EVERY, end=found.times[-1])

    def serve(self, endpoint: Endpoint, rate: float, seconds: float) -> None:
        with self.of("endpoint"):
            asyncio.run(load(endpoint, rate, seconds))

    def caption(self, rows: int) -> None:
        """Caption with two jobs at once; some of the first one's images are missing or unreadable."""
        unreadable = self.folder / "unreadable.png"
        unreadable.write_bytes(b"no image")
        images = images_of(self.data)
        faulty = [*images[:60], unreadable, *images[60:100], self.folder / "missing.png"]
        sections: dict[str, Any] = {
            "sampling": {"max_new_tokens": 96},
            "engine": {"max_sequences": 8},
            "scaling": {"cpus_per_worker": 1},
        }
        with self.of("batch"):
            for name, each, count in (("shapes-faulty", faulty, rows), ("shapes-sample", images, rows // 3)):
                settings = captioning(self.folder, MODEL_FOLDER, each, count, name=name, **sections)
                self.jobs.start("caption", settings, name)
            for process in self.jobs.started:
                result(process)

    def tune(self, endpoint: Endpoint, steps: int) -> None:
        """Fine-tune, and kill the worker shortly before the last checkpoint but one."""
        killed = False

        def watch(line: str) -> None:
            nonlocal killed
            found = re.match(r"step (\d+)/", line)
            if found and not killed and int(found[1]) >= 5 * steps / 6 - 3:
                killed = True
                asyncio.run(killing(endpoint, "RayTrainWorker")())

        settings = fine_tuning(
            *(self.folder, MODEL_FOLDER, self.data),
            name="shapes-adapter",
            skip={"retained": 64, "skipped": 64},
            training={
                "max_steps": steps,
                "batch_size": 16,
                "checkpoint_every": max(steps // 6, 1),
                "log_every": 1,
            },
            scaling={"cpus_per_worker": 1, "max_failures": 2},
        )
        with self.of("training"):
            result(self.jobs.start("finetune", settings), watch)
        assert killed, "the job was faster than its reports"


async def load(endpoint: Endpoint, rate: float, seconds: float) -> None:
    """Send requests to an endpoint; meanwhile an engine dies, then an ingress, and last too many come.

    The middle third of the time has twice the rate. Half of the answers are streamed, and one request in
    twenty names a model that does not exist. Whatever dies holds requests whose answers have not begun, so
    these are sent again.
    """
    requests = _endpoint.bodies(0, max_tokens=48)

    async def one(number: int) -> _endpoint.Outcome:
        body = {**next(requests), "stream": bool(number % 2)}
        return await _endpoint.ask(
            session, endpoint, {**body, "model": "none"} if number % 20 == 19 else body
        )

    async def kill(title: str) -> None:
        killed = False

        async def hold(number: int) -> None:
            while not killed:
                await one(2 * number)

        held = asyncio.gather(*(hold(number) for number in range(8)))  # as many as the engines hold
        await asyncio.sleep(1)
        await killing(endpoint, title)()
        killed = True
        await held

    async def faults() -> None:
        await asyncio.sleep(0.4 * seconds)
        await kill(f":engine-{MODEL}")
        await asyncio.sleep(0.3 * seconds)
        await kill(":ingress")
        await asyncio.sleep(0.15 * seconds)
        await asyncio.gather(*(one(2 * number) for number in range(60)))

    more = [seconds / 3 + at for at in _endpoint.arrivals(rate, seconds / 3, seed=1)]
    times = sorted([*_endpoint.arrivals(rate, seconds, seed=0), *more])
    async with _endpoint.session() as session:
        await asyncio.gather(_endpoint.offered(times, one), faults())


@contextmanager
def recording(*, rate: float, seconds: float, rows: int, steps: int) -> Iterator[Recording]:
    """Run an endpoint, captioning and fine-tuning, one after the other.

    Args:
        rate: requests per second.
        seconds: time of the endpoint's load.
        rows: rows of the larger captioning job.
        steps: of fine-tuning.

    Raises:
        SystemExit: Prometheus is not installed.
    """
    if not is_installed():
        raise SystemExit(MISSING)
    os.environ |= ENVIRONMENT
    engines = {"engine": {"max_sequences": 4}, "scaling": {"min_engines": 2, "max_engines": 2}}
    with (
        tempfile.TemporaryDirectory() as folder,
        rays_folder(),
        local_endpoint(ingresses=2, limits={"queued_requests": 8}, **engines) as endpoint,
        scraping(node_addresses(), EVERY) as source,
    ):
        from ray import serve as ray_serve

        made = Recording(source, Path(folder))
        try:
            made.serve(endpoint, rate, seconds)
            ray_serve.delete("skipvision")
            made.caption(rows)
            made.tune(endpoint, steps)
            yield made
        finally:
            made.jobs.end()


def node_addresses() -> list[str]:
    """The addresses at which the nodes of this Ray export their metrics."""
    import ray

    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]


def main() -> None:
    """Draw all dashboards of infra/grafana into image files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="folder of the images")
    add("--rate", type=float, default=1.5, help="requests per second (default: %(default)s)")
    add("--seconds", type=float, default=300, help="time of the endpoint's load (default: %(default)s)")
    add("--rows", type=int, default=900, help="rows of the larger captioning job (default: %(default)s)")
    add("--steps", type=int, default=150, help="steps of fine-tuning (default: %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    work = {name: getattr(options, name) for name in ("rate", "seconds", "rows", "steps")}
    with recording(**work) as made:
        for name in DASHBOARDS:
            path = options.output / f"dashboard_{name}.png"
            draw(name, made.source, made.windows[name]).savefig(path)
            print(path)


if __name__ == "__main__":
    main()
