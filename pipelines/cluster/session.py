"""Join a Ray cluster, or start one on this machine for the length of a job."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipelines._compat import LOOPBACK, ray_on_loopback
from pipelines.cluster.cpus import usable_cpus
from pipelines.shared.paths import in_ray_job
from pipelines.shared.stopping import handlers_kept

ROOT = Path(__file__).parents[2]
"""The repository's root: Ray's workers import from here."""

_LOGGING = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # workers' lines look like the job's own
    "RAY_FLUSH_DRIVER_LOGS": "1",  # and appear at once, also in a pipe
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PreemptionWatcher|PlacementGroupCleaner",  # Ray Train's internal actors
}
"""What Ray logs. Ray reads these variables when it is imported."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to Ray for the length of the block.

    An existing connection is used and kept open. A Ray job joins its own cluster. Otherwise ``$RAY_ADDRESS``
    is joined, if it is set, or a local Ray is started and stopped. Other Rays on this machine are never
    joined.
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
        # Several Rays may run here: the job's other processes need its Ray's address, too.
        known = {name: os.environ[name] for name in ["RAY_ADDRESS"] if name in os.environ}
        ray.init(logging_level="WARNING", runtime_env={"env_vars": known})
    elif address := os.environ.get("RAY_ADDRESS"):
        print(f"joining Ray at {address} …", flush=True)
        ray.init(logging_level="WARNING", runtime_env={"working_dir": str(ROOT)})
    else:
        print("starting Ray on this machine for this run …", flush=True)
        _start_local()


def _start_local() -> None:
    """Start Ray on loopback, on a known port: its processes find it even if several Rays run."""
    ray = _ray()
    # Without a mode, Ray may write a token that every later cluster of this user demands.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    port = os.environ["RAY_GCS_SERVER_PORT"] = str(_free_port())
    environment = {
        "PYTHONPATH": os.pathsep.join(search),
        "RAY_ADDRESS": f"{LOOPBACK}:{port}",
    }
    try:
        with ray_on_loopback():
            ray.init(
                address="local",
                _node_ip_address=LOOPBACK,
                num_cpus=usable_cpus(),
                logging_level="WARNING",
                runtime_env={"env_vars": environment},
            )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


def _ray() -> ModuleType:
    """Import Ray with our logging settings."""
    for name, value in _LOGGING.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def ray_is_running() -> bool:
    """Return whether `ray_session` joins a Ray, which takes a second, or starts one."""
    ray = _ray()
    return ray.is_initialized() or in_ray_job() or bool(os.environ.get("RAY_ADDRESS"))
