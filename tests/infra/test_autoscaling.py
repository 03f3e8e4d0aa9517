"""Ray's autoscaler, with nodes that are processes of this machine, grows for a job and shrinks after it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LISTS = (
    *("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands"),
    *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)
"""Fields that Ray expects in a cluster's settings, and that processes on one machine leave empty."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Autoscaled:
    """A head without CPUs, and workers with two CPUs each that the autoscaler starts and stops.

    ``AutoscalingCluster`` of Ray is not used: it stops every Ray of the machine.
    """

    def __init__(self, folder: Path, max_workers: int) -> None:
        self.address = f"{socket.gethostbyname(socket.gethostname())}:{free_port()}"
        resources = {"object_store_memory": 100 * 2**20}
        settings = {
            "cluster_name": "test",
            "max_workers": max_workers,
            "idle_timeout_minutes": 0.2,
            # Its type `fake_multinode` needs a file that Ray's wheel lacks.
            "provider": {"type": "external", "module": PROVIDER, "gcs_address": self.address},
            "available_node_types": {
                "head": {"resources": {"CPU": 0, **resources}, "node_config": {}, "max_workers": 0},
                "worker": {
                    "resources": {"CPU": 2, **resources},
                    "node_config": {},
                    "max_workers": max_workers,
                },
            },
            "head_node_type": "head",
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in LISTS},
        }
        config = folder / "cluster.json"
        config.write_text(json.dumps(settings))
        host, _, port = self.address.partition(":")
        command = [
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--autoscaling-config={config}",
        ]
        command += [f"--node-ip-address={host}", f"--port={port}", "--num-cpus=0"]
        command += [f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
        command += [f"--object-store-memory={100 * 2**20}"]
        environment = {
            **os.environ,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
        }
        self.log = folder / "head.log"
        with self.log.open("wb") as log:
            self.head = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)

    def workers(self) -> int:
        """The number of worker nodes that live."""
        from ray._raylet import GcsClient

        nodes = GcsClient(address=self.address).get_all_node_info().values()
        return sum(node.state == 0 for node in nodes) - 1

    def stop(self) -> None:
        processes = psutil.Process(self.head.pid).children(recursive=True)
        self.head.terminate()
        _, alive = psutil.wait_procs([psutil.Process(self.head.pid), *processes], timeout=30)
        for process in alive:
            process.kill()
        self.head.wait()


@pytest.fixture
def autoscaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Autoscaled]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    started = Autoscaled(tmp_path, max_workers=2)
    yield started
    started.stop()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < end:
        time.sleep(0.5)
    return reached


def started(cluster: Autoscaled) -> bool:
    try:
        return cluster.workers() == 0
    except Exception:  # the head does not listen yet
        return False


def test_the_cluster_grows_for_captioning_and_shrinks_after_it(autoscaled, tiny_model, shapes_data, tmp_path):
    assert wait_for(lambda: started(autoscaled), 120), autoscaled.log.read_text()
    settings: dict[str, Any] = {
        "name": "captions",
        "storage": str(tmp_path),
        "model": {"path": str(tiny_model)},
        "input": {"source": str(shapes_data / "images"), "limit": 20},
        "sampling": {"max_new_tokens": 4},
        "output": {"shard_rows": 5},
        "samples": 0,
        "scaling": {"workers": 2, "cpus_per_worker": 1.5, "autoscaling": True},
    }
    config = tmp_path / "caption.json"
    config.write_text(json.dumps(settings))
    environment = {**os.environ, "RAY_ADDRESS": autoscaled.address, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, ROOT / "jobs/caption.py", "--config", config],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    most = 0

    def finished() -> bool:
        nonlocal most
        most = max(most, autoscaled.workers())
        return job.poll() is not None

    assert wait_for(finished, 900)
    output = job.communicate()[0]
    assert job.returncode == 0, output
    assert json.loads(output.splitlines()[-1])["captioned"] == 20
    assert most == 2  # an engine with 1.5 CPUs on each
    assert wait_for(lambda: autoscaled.workers() == 0, 180)
