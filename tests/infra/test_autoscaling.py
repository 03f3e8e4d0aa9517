"""Ray's autoscaler, with nodes that are processes of this machine, grows for a job and shrinks after it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from tests.infra.clusters import Jobs, free_port, rays_folder, result, wait_for
from tests.infra.work import captioning, images_of

NODES = 3
LISTS = (
    *("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands"),
    *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)
"""Fields that Ray expects in a cluster's settings, and that processes on one machine leave empty."""
HEAD = "ray.head.default"
"""The provider's name for the type of the head."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Autoscaled:
    """A head without CPUs, and nodes with two CPUs each that the autoscaler starts and stops.

    ``AutoscalingCluster`` of Ray is not used: it stops every Ray of the machine.
    """

    def __init__(self, folder: Path) -> None:
        self.address = f"{socket.gethostbyname(socket.gethostname())}:{free_port()}"
        config = folder / "cluster.json"
        config.write_text(json.dumps(self._settings()))
        host, _, port = self.address.partition(":")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--autoscaling-config={config}", f"--node-ip-address={host}", f"--port={port}"]
        command += ["--num-cpus=0", f"--object-store-memory={100 * 2**20}", "--include-dashboard=false"]
        command += [f"--{name}={free_port()}" for name in ("ray-client-server-port", *PORTS)]
        environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        self.log = folder / "head.log"
        with self.log.open("wb") as log:
            self.head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def _settings(self) -> dict[str, Any]:
        memory = {"object_store_memory": 100 * 2**20}
        return {
            "cluster_name": "test",
            "max_workers": NODES,
            "idle_timeout_minutes": 0.2,
            # Its type `fake_multinode` needs a file that Ray's wheel lacks.
            "provider": {
                "type": "external",
                "module": PROVIDER,
                "gcs_address": self.address,
                "launch_multiple": True,
                "use_node_id_as_ip": True,  # all nodes have the same address
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                HEAD: {"resources": {"CPU": 0, **memory}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": {"CPU": 2, **memory}, "node_config": {}, "max_workers": NODES},
            },
            "head_node_type": HEAD,
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{name: [] for name in LISTS},
        }

    def nodes(self) -> int | None:
        """The number of live nodes besides the head; None before the head listens."""
        from ray._raylet import GcsClient

        try:
            found = GcsClient(address=self.address).get_all_node_info().values()
        except Exception:
            return None
        return sum(node.state == 0 for node in found) - 1

    def stop(self) -> None:
        """End the head and its children, which are the nodes and their processes."""
        head = psutil.Process(self.head.pid)
        processes = [head, *head.children(recursive=True)]
        head.terminate()
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            process.kill()
        self.head.wait()


@pytest.fixture
def autoscaled(tmp_path: Path) -> Iterator[Autoscaled]:
    with rays_folder():
        started = Autoscaled(tmp_path)
        yield started
        started.stop()


def test_the_cluster_grows_for_captioning_and_shrinks_after_it(autoscaled, tiny_model, shapes_data, tmp_path):
    assert wait_for(lambda: autoscaled.nodes() == 0, 180), autoscaled.log.read_text()
    rows = 400
    # An engine fills a node, so the reader needs a third one.
    scaling = {"workers": 2, "cpus_per_worker": 2, "autoscaling": True}
    settings = captioning(tmp_path, tiny_model, images_of(shapes_data), rows, samples=0, scaling=scaling)
    jobs = Jobs(autoscaled.address, tmp_path)
    seen = set()
    try:
        job = jobs.start("caption", settings)
        answer = result(job, lambda _: seen.add(autoscaled.nodes() or 0))
    finally:
        jobs.end()
    assert answer["captioned"] == rows
    captions = pq.read_table(answer["captions"])["key"].to_pylist()
    assert sorted(captions) == sorted(f"row-{number}" for number in range(rows))
    assert max(seen) == NODES
    assert wait_for(lambda: autoscaled.nodes() == 0, 240)
