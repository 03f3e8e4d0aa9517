"""Join a Ray cluster, or start one on this machine for the length of a job."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from pipelines._compat import LOOPBACK, ray_on_loopback
from pipelines.cluster.address import default_folder, host_and_port, ray_address, short_folder, short_tmpdir
from pipelines.cluster.cpus import usable_cpus
from pipelines.shared.console import say
from pipelines.shared.paths import in_ray_job
from pipelines.shared.stopping import handlers_kept
from skipvision.errors import ResourceError

ROOT = Path(__file__).parents[2]
"""The repository's root: Ray's workers import from here."""

_STARTS = 2
_CONNECT_SECONDS = 10

_LOGGING = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # workers' lines look like the job's own
    "RAY_FLUSH_DRIVER_LOGS": "1",  # and appear at once, also in a pipe
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PreemptionWatcher|PlacementGroupCleaner",  # Ray Train's internal actors
}
"""Settings of Ray's logs. Ray reads these variables when it is imported."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to Ray for the length of the block.

    An existing connection is used and kept open. A Ray job joins its own cluster. Otherwise ``$RAY_ADDRESS``
    is joined, if it is set, or a local Ray is started and stopped. Other Rays on this machine are never
    joined.

    Raises:
        ConfigError: ``$RAY_ADDRESS`` is not the address of a Ray.
        ResourceError: Ray cannot be joined or started.
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


def check_ray_address() -> None:
    """Check at the start of a job what `ray_session` would only find when the work begins.

    Raises:
        ConfigError: ``$RAY_ADDRESS`` is not the address of a Ray.
    """
    if not in_ray_job() and not ("ray" in sys.modules and _ray().is_initialized()):
        ray_address()


def _connect() -> None:
    ray = _ray()
    if in_ray_job():
        # Several Rays may run here: the job's other processes need its Ray's address, too.
        known = {name: os.environ[name] for name in ["RAY_ADDRESS"] if name in os.environ}
        ray.init(logging_level="WARNING", runtime_env={"env_vars": known})
    elif address := ray_address():
        say(f"joining Ray at {address} …")
        _join(address)
    else:
        say("starting Ray on this machine for this run …")
        _start_local()


def _join(address: str) -> None:
    try:
        if address != "auto":  # Ray tries for minutes
            _check_answers(*host_and_port(address))
        _ray().init(address=address, logging_level="WARNING", runtime_env={"working_dir": str(ROOT)})
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"RAY_ADDRESS = {address}: no Ray can be joined there: {_first_line(error)}. Start one there "
            "with `ray start --head`, correct the address, or unset RAY_ADDRESS to start a Ray for this job"
        ) from error


def _check_answers(host: str, port: int) -> None:
    """Raise `OSError` if nothing listens at an address, or something that is no gRPC server."""
    with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
        pass
    if os.environ.get("RAY_USE_TLS", "0") == "1":  # this would need the certificates
        return
    import grpc

    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    channel = grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
    except grpc.FutureTimeoutError:
        raise OSError("something listens there, but it does not answer as a Ray does") from None
    finally:
        channel.close()


def _start_local() -> None:
    """Start Ray on this machine; try again if a loaded machine is too slow for Ray's patience.

    Raises:
        ResourceError: it did not start.
    """
    hidden = os.environ.pop("RAY_ADDRESS", None)  # "local" or empty
    try:
        for attempt in range(1, _STARTS + 1):
            try:
                _start_once()
                return
            except Exception as error:  # Ray raises bare exceptions, RuntimeError, OSError and gRPC errors
                _ray().shutdown()
                if attempt == _STARTS:
                    logs = Path(short_folder() or default_folder()) / "session_latest" / "logs"
                    raise ResourceError(
                        f"Ray did not start on this machine in {_STARTS} tries: {_first_line(error)}\nThe "
                        "machine may be overloaded, or out of memory or of disk space: run the same job "
                        f"again when it has less to do. Ray's logs are in {logs}"
                    ) from error
                say(f"Ray did not start: {_first_line(error)} Trying again …")
    finally:
        if hidden is not None:
            os.environ["RAY_ADDRESS"] = hidden


def _start_once() -> None:
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
        with ray_on_loopback(), short_tmpdir():
            ray.init(
                address="local",
                _node_ip_address=LOOPBACK,
                num_cpus=usable_cpus(),
                logging_level="WARNING",
                runtime_env={"env_vars": environment},
                _temp_dir=short_folder(),
            )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    return ray.is_initialized() or in_ray_job() or ray_address() is not None
