"""Joining or starting a Ray, and asking it for no more than it has."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipelines.cluster.cpus import usable_cpus
from pipelines.shared.paths import in_ray_job
from pipelines.shared.stopping import handlers_kept

ROOT = Path(__file__).parents[2]
"""The repository: what Ray's workers must be able to import from."""

_SPEECH = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # the workers' lines are the job's own
    "RAY_FLUSH_DRIVER_LOGS": "1",  # and are to be seen at once, also in a pipe
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PreemptionWatcher|PlacementGroupCleaner",  # Ray Train's, of themselves
}
"""What Ray is to say; it looks when it is imported."""


@contextmanager
def ray_session() -> Iterator[None]:
    """A connection to Ray for the length of the block.

    One that is there already is used and left alone; a Ray job joins its own cluster; ``$RAY_ADDRESS``
    is joined; otherwise a local Ray is started and stopped again. A Ray that merely happens to run on
    this machine is never joined.
    """
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    try:
        with handlers_kept():
            _connect()
        yield
    finally:
        ray.shutdown()


def _connect() -> None:
    ray = _ray()
    if in_ray_job():
        # The job knows its Ray's address; its other processes must too, where several run.
        known = {name: os.environ[name] for name in ["RAY_ADDRESS"] if name in os.environ}
        ray.init(logging_level="WARNING", runtime_env={"env_vars": known})
    elif address := os.environ.get("RAY_ADDRESS"):
        print(f"joining the Ray at {address} …", flush=True)
        ray.init(logging_level="WARNING", runtime_env={"working_dir": str(ROOT)})
    else:
        print("starting a Ray on this machine, for this run alone …", flush=True)
        _start_here()


def _start_here() -> None:
    """A Ray whose own processes find it, also where several run; left alone, Ray tells nobody its port."""
    ray = _ray()
    # Without a mode Ray may write a token that every later cluster of this user then demands.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    port = os.environ["RAY_GCS_SERVER_PORT"] = str(_free_port())
    environment = {
        "PYTHONPATH": os.pathsep.join(search),
        "RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}",
    }
    try:
        ray.init(
            address="local",
            num_cpus=usable_cpus(),
            logging_level="WARNING",
            runtime_env={"env_vars": environment},
        )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


def _ray() -> ModuleType:
    """Ray, told what to say."""
    for name, value in _SPEECH.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def ray_is_there() -> bool:
    """Whether `ray_session` joins a Ray, which takes a second, or has to start one."""
    ray = _ray()
    return ray.is_initialized() or in_ray_job() or bool(os.environ.get("RAY_ADDRESS"))
