"""What the jobs start listens on loopback, or answers nobody without a token (CVE-2026-27482)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from pipelines.cluster.local import local_ray

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)

SESSION = """
import json, time
import psutil
from pipelines.cluster.session import ray_session

with ray_session():
    import ray
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    time.sleep(2)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    print(json.dumps([
        (process.name(), each.laddr.ip)
        for process in processes
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]))
"""


@pytest.mark.slow
def test_the_ray_of_a_job_listens_on_loopback_only():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", SESSION]
    run = subprocess.run(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    listening = json.loads(run.stdout.splitlines()[-1])
    assert {name for name, _ in listening} >= {"gcs_server", "raylet"}
    outside = [(name, ip) for name, ip in listening if not _is_loopback(ip)]
    assert outside == []


def _is_loopback(ip: str) -> bool:
    address = ip_address(ip)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@pytest.mark.slow
def test_the_ray_of_the_demo_wants_a_token():
    with local_ray() as ray:
        own = [p for p in psutil.process_iter(["cmdline"]) if ray.dashboard.rpartition(":")[2] in str(p.info)]
        assert own
        assert _status(f"{ray.dashboard}/api/jobs/") == 401
        assert _status(f"{ray.dashboard}/api/jobs/", "Bearer wrong") == 403
        assert _status(f"{ray.dashboard}/api/jobs/", f"Bearer {ray.token}") == 200
        assert ray.token not in repr(ray)


def _status(url: str, authorization: str | None = None) -> int:
    headers = {} if authorization is None else {"Authorization": authorization}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
