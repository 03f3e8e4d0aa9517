"""Jobs on a cluster of four nodes, one of which is killed in the middle: nothing is lost, little is repeated.

The nodes are raylets on this machine, each with its own worker processes and object store. A killed node
loses all of them at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets of Ray
]


class Nodes:
    """A head without CPUs and three nodes with two CPUs each, as separate processes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

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


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started = Nodes()
    yield started
    started.cluster.shutdown()


def start(nodes: Nodes, job: str, settings: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    config = folder / f"{job}.json"
    config.write_text(json.dumps(settings))
    environment = {
        **os.environ,
        "RAY_ADDRESS": nodes.cluster.address,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, ROOT / "jobs" / f"{job}.py", "--config", config]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def result(process: subprocess.Popen[str], killed: Callable[[str], bool]) -> dict[str, Any]:
    """Call ``killed`` with each line of a job until it returns true; return the job's result."""
    lines, done = [], False
    with process:
        for line in process.stdout:
            lines.append(line)
            done = done or killed(line)
    assert process.returncode == 0, "".join(lines[-60:])
    assert done, "".join(lines[-60:])
    return json.loads(lines[-1])


def test_captioning_survives_the_death_of_a_node(nodes, tiny_model, shapes_data, tmp_path):
    images = sorted((shapes_data / "images").rglob("*.png"))
    rows = [{"id": f"row-{number}", "image": str(images[number % len(images)])} for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        "name": "captions",
        "storage": str(tmp_path),
        "model": {"path": str(tiny_model)},
        "input": {"source": str(tmp_path / "rows.jsonl")},
        "sampling": {"max_new_tokens": 32},
        "engine": {"max_sequences": 4},
        "output": {"shard_rows": 10},
        "scaling": {"workers": 2, "cpus_per_worker": 1.5},
    }
    attempts, held = tmp_path / "captions/attempts", []

    def kill_an_engine(line: str) -> bool:
        found = re.match(r"row (\d+)/200", line)
        if not found or int(found[1]) >= 150:
            return False
        node = nodes.with_process("CaptionActor")[0]
        held.extend(path.name for path in attempts.iterdir())  # pieces that both engines have begun
        nodes.kill(node)
        return True

    answer = result(start(nodes, "caption", settings, tmp_path), kill_an_engine)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "captions/captions").glob("*.parquet"))]
    keys = Counter(key for table in tables for key in table["key"].to_pylist())
    assert keys == Counter(row["id"] for row in rows)
    assert answer["captioned"] == len(rows)
    print(f"captioning: 0 of {len(rows)} rows lost, at most {len(held)} repeated")
    # With four captions at once a block is one row, and an engine holds twelve blocks.
    assert len(held) <= 2 * 12


def test_fine_tuning_survives_the_death_of_a_node(nodes, tiny_model, shapes_data, tmp_path):
    from pipelines.tracking.client import connect

    steps, every = 60, 5
    settings = {
        "name": "tuned",
        "storage": str(tmp_path),
        "model": {"path": str(tiny_model)},
        "data": {"train": str(shapes_data / "train.json")},
        "training": {"max_steps": steps, "batch_size": 4, "checkpoint_every": every, "log_every": 1},
        "tracking": {"registered_model": None, "system_metrics_seconds": 0},
        "scaling": {"workers": 2, "cpus_per_worker": 2, "max_failures": 3},
    }
    reached = 0

    def kill_a_worker(line: str) -> bool:
        nonlocal reached
        found = re.match(rf"step (\d+)/{steps}", line)
        if not found or int(found[1]) < 2 * every + 3:
            return False
        reached = int(found[1])
        nodes.kill(nodes.with_process("RayTrainWorker")[-1])
        return True

    process = start(nodes, "finetune", settings, tmp_path)
    answer = result(process, kill_a_worker)
    assert answer["steps"] == steps
    client = connect(answer["mlflow_uri"])
    recorded = Counter(one.step for one in client.get_metric_history(answer["mlflow_run_id"], "loss"))
    repeated = sum(recorded.values()) - len(recorded)
    print(f"fine-tuning: 0 of {steps} steps lost, {repeated} repeated, killed after step {reached}")
    assert set(recorded) == set(range(1, steps + 1))
    assert repeated <= 2 * every
