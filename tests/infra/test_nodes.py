"""Jobs and an endpoint on four nodes, one of which is killed: nothing is lost, and little is repeated.

The nodes are raylets on this machine, each with its own worker processes and object store. A killed node
loses all of them at once.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.infra.clusters import Jobs, free_port, rays_folder, result, wait_for
from tests.infra.work import captioning, fine_tuning, images_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets of Ray
]


class Nodes:
    """A head without CPUs and three nodes with two CPUs each, as separate processes."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.folder = folder
        each = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **each})
        self.workers = [self.cluster.add_node(wait=False, num_cpus=2, **each) for _ in range(3)]
        self.cluster.wait_for_nodes(timeout=300)

    def processes(self, node: Any) -> list[psutil.Process]:
        """The raylet of a node and all its children."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def with_process(self, name: str) -> list[Any]:
        """The nodes that run a process whose title contains ``name``."""
        return [
            node
            for node in self.workers
            if any(name in " ".join(process.cmdline()) for process in self.processes(node))
        ]

    def kill(self, node: Any) -> None:
        """Kill every process of a node at once, as a power cut does."""
        for process in self.processes(node):
            process.kill()
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def printed(self) -> str:
        """All lines of all workers, with those that a killed node did not send to the job."""
        return "".join(path.read_text() for path in self.folder.rglob("worker-*.out"))


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with rays_folder() as folder:
        started = Nodes(folder)
        yield started
        started.cluster.shutdown()


@pytest.fixture
def jobs(nodes: Nodes, tmp_path: Path) -> Iterator[Jobs]:
    started = Jobs(nodes.cluster.address, tmp_path)
    yield started
    started.end()


class Pieces(threading.Thread):
    """Counts how often engines begin each piece of a captioning job, by looking at its files of attempts."""

    def __init__(self, attempts: Path) -> None:
        super().__init__(daemon=True)
        self.attempts, self.end = attempts, threading.Event()
        self.begun: Counter[str] = Counter()

    def run(self) -> None:
        before: dict[str, int] = {}
        while not self.end.wait(0.005):
            now = self._sizes()
            for name, size in now.items():
                self.begun[name] += max(0, size - before.get(name, 0))
            before = now

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        with suppress(FileNotFoundError):  # before the job's first piece, and after its last
            for path in self.attempts.iterdir():
                with suppress(FileNotFoundError):  # an engine has just ended this piece
                    sizes[path.name] = path.stat().st_size
        return sizes

    @property
    def repeated(self) -> int:
        return sum(count - 1 for count in self.begun.values() if count)


def once(kill: Callable[[str], bool]) -> Callable[[str], None]:
    """Call ``kill`` with each line until it returns true."""
    done = False

    def watch(line: str) -> None:
        nonlocal done
        done = done or kill(line)

    return watch


def test_captioning_survives_the_death_of_a_node(nodes, jobs, tiny_model, shapes_data, tmp_path):
    rows = 200
    scaling = {"workers": 2, "cpus_per_worker": 1.5}
    settings = captioning(tmp_path, tiny_model, images_of(shapes_data), rows, scaling=scaling)
    killed_at = 0

    def kill_an_engine(line: str) -> bool:
        nonlocal killed_at
        found = re.match(r"row (\d+)/200", line)
        if not found or int(found[1]) >= 150:
            return False
        killed_at = int(found[1])
        nodes.kill(nodes.with_process("CaptionActor")[0])
        return True

    pieces = Pieces(tmp_path / "captions/attempts")
    pieces.start()
    answer = result(jobs.start("caption", settings), once(kill_an_engine))
    pieces.end.set()
    pieces.join()
    assert killed_at, "the job was faster than its first report"
    tables = [pq.read_table(path) for path in sorted((tmp_path / "captions/captions").glob("*.parquet"))]
    keys = Counter(key for table in tables for key in table["key"].to_pylist())
    assert keys == Counter(f"row-{number}" for number in range(rows))
    assert answer["captioned"] == rows
    print(f"captioning: 0 of {rows} rows lost, {pieces.repeated} repeated, killed after {killed_at}")
    # With four captions at once a block is one row, and an engine holds twelve blocks.
    assert 0 < pieces.repeated <= 2 * 12


def test_fine_tuning_survives_the_death_of_a_node(nodes, jobs, tiny_model, shapes_data, tmp_path):
    from pipelines.tracking.client import connect

    steps, every = 60, 5
    settings = fine_tuning(
        *(tmp_path, tiny_model, shapes_data),
        training={"max_steps": steps, "batch_size": 4, "checkpoint_every": every, "log_every": 1},
        scaling={"workers": 2, "cpus_per_worker": 2, "max_failures": 3},
    )
    reached = 0

    def kill_a_worker(line: str) -> bool:
        nonlocal reached
        found = re.match(rf"step (\d+)/{steps}", line)
        if not found or int(found[1]) < 2 * every + 3:
            return False
        reached = int(found[1])
        nodes.kill(nodes.with_process("RayTrainWorker")[-1])
        return True

    answer = result(jobs.start("finetune", settings), once(kill_a_worker))
    assert reached, "no node was killed"
    assert answer["steps"] == steps
    client = connect(answer["mlflow_uri"])
    recorded = {one.step for one in client.get_metric_history(answer["mlflow_run_id"], "loss")}
    taken = Counter(map(int, re.findall(rf"^step (\d+)/{steps} ", nodes.printed(), re.MULTILINE)))
    assert recorded == set(taken) == set(range(1, steps + 1))
    repeated = sorted(step for step, count in taken.items() if count > 1)
    print(f"fine-tuning: 0 of {steps} steps lost, {repeated} repeated, killed after step {reached}")
    assert max(taken.values()) == 2
    assert 0 < len(repeated) <= 2 * every


class Clients:
    """Clients that send one request after another, each up to three times, as the OpenAI client does."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.end = url, threading.Event()
        self.tries: list[int] = []
        self.lost: list[str] = []
        self.threads = [threading.Thread(target=self._send_all) for _ in range(count)]

    def _send_all(self) -> None:
        while not self.end.is_set():
            for tries in range(1, 4):
                try:
                    self._send()
                except (OSError, ValueError) as error:
                    reason = repr(error)
                    time.sleep(1)
                else:
                    self.tries.append(tries)
                    break
            else:
                self.lost.append(reason)

    def _send(self) -> None:
        messages = [{"role": "user", "content": "What is it?"}]
        body = json.dumps({"model": "tiny", "max_tokens": 48, "messages": messages}).encode()
        request = urllib.request.Request(self.url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["usage"]["completion_tokens"] > 0


def test_an_endpoint_survives_the_death_of_a_node(nodes, jobs, tiny_model):
    port = free_port()
    scaling = {"min_engines": 3, "max_engines": 3, "cpus_per_engine": 0.5}
    model = {"path": str(tiny_model), "name": "tiny", "scaling": scaling}
    result(jobs.start("deploy", {"models": [model], "port": port, "ingresses": 2}))
    holding = nodes.with_process(":engine")
    assert len(holding) > 1, "the engines are on one node"

    clients = Clients(f"http://127.0.0.1:{port}/v1/chat/completions", 6)
    for thread in clients.threads:
        thread.start()
    try:
        assert wait_for(lambda: len(clients.tries) > 20, 120)
        nodes.kill(holding[-1])
        before = len(clients.tries)
        assert wait_for(lambda: len(clients.tries) > before + 60, 300), clients.lost
    finally:
        clients.end.set()
        for thread in clients.threads:
            thread.join()
    resent = sum(tries - 1 for tries in clients.tries)
    print(f"endpoint: {len(clients.lost)} of {len(clients.tries)} requests lost, {resent} sent again")
    assert clients.lost == []
    assert resent <= 2 * 6  # those on their way when the node died, at most twice
