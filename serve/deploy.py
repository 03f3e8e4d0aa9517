"""Deploy an endpoint on a cluster and report where it listens: the work of `jobs/deploy.py`."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from typing import Any

from ray import serve as ray_serve

from pipelines.cluster.resources import node_resources
from pipelines.cluster.session import ray_is_running, ray_session
from pipelines.shared.console import say
from serve import _compat
from serve.app import application
from serve.capacity import check_capacity, report_waiting
from serve.config import Proxy, ServeConfig
from serve.ingress.dispatch import GRACE_SECONDS
from skipvision.errors import ConfigError, SkipVisionError

_ALWAYS = {
    # `DeploymentError` reports once why an engine fails; Ray's log has the tracebacks.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front:middlewares",
    # Ray's default of 10 s is too long: no request is answered while a proxy is dead.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # HAProxy learns at once that a replica stops. Ray's 30 s are for load balancers that poll.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
_ENVIRONMENT: dict[Proxy, dict[str, str]] = {"ray": _ALWAYS, "haproxy": _ALWAYS | _HAPROXY}
"""Environment variables of Ray Serve's controller, which proxies and replicas inherit (Ray 2.60.0)."""

_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception)\b.*", re.MULTILINE)
"""The last line of a traceback."""


class DeploymentError(SkipVisionError):
    """The application did not start."""


def run_deploy(config: ServeConfig) -> dict[str, Any]:
    """Deploy an endpoint. Return its URL and the names of its models.

    On a running cluster (in a Ray job, or with ``$RAY_ADDRESS``) the application outlives this process;
    ``serve shutdown`` stops it. Otherwise this process starts Ray and runs until Ctrl-C or SIGTERM. It then
    finishes the open requests and stops Ray.

    Raises:
        ConfigError: the settings cannot be honoured.
        DeploymentError: the application did not start.
        ResourceError: this machine has too few CPUs or GPUs.
    """
    app = application(config)
    joined = ray_is_running()
    if not joined:  # a cluster may have other work now, and more nodes later
        check_capacity(config, node_resources())
    with ray_session():
        start(config.host, config.port, config.proxy)
        # Hides a line at every start about connecting to the Serve instance that `start` made.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            with report_waiting(config.name):
                ray_serve.run(app, name=config.name, route_prefix="/")
        except RuntimeError as error:
            reasons = "; ".join(_failures(config.name)) or error
            raise DeploymentError(f"{config.name!r} did not start: {reasons}") from error
        url = f"http://{config.host}:{config.port}"
        say(f"{', '.join(config.served())} at {url}/v1")
        if not joined:
            _wait_for_interrupt()
            drain(config)
            _compat.stop_serve()
    return {"url": url, "models": list(config.served())}


def start(host: str, port: int, proxy: Proxy = "ray") -> None:
    """Start Ray Serve on this cluster unless it already runs.

    Args:
        host: address that the proxies listen on.
        port: port that they listen on.
        proxy: as in `ServeConfig.proxy`.

    Raises:
        ConfigError: Ray Serve already runs at another address.
    """
    if _compat.serve_is_running():
        say("Ray Serve already runs on this cluster and keeps its proxy")
    environment = {name: os.environ.get(name, value) for name, value in _ENVIRONMENT[proxy].items()}
    ray_serve.start(
        http_options={"host": host, "port": port},
        controller_options={"runtime_env": {"env_vars": environment}},
    )
    # A running Ray Serve ignores the options and keeps its address.
    running = _compat.serve_address()
    if running != (host, port):
        raise ConfigError(
            f"host = {host}, port = {port}: Ray Serve already runs on this cluster at "
            f"{running.host}:{running.port}, and has one address: use it, or stop Ray Serve and all its "
            "applications first with `serve shutdown`"
        )


def _failures(name: str) -> list[str]:
    """Return one line for each failed deployment of an application; a traceback's last line."""
    application = ray_serve.status().applications.get(name)
    deployments = {} if application is None else application.deployments
    messages = {name: each.message for name, each in deployments.items() if each.status in _FAILED}
    return [f"{name}: {(_RAISED.findall(text) or [text])[-1]}" for name, text in messages.items()]


def drain(config: ServeConfig) -> None:
    """Stop taking requests, and return once the open ones are answered or past their deadline."""
    # ray_serve.shutdown() alone would kill the proxies at once.
    _compat.begin_delete(config.name)
    end = time.monotonic() + config.limits.request_seconds + GRACE_SECONDS
    while config.name in ray_serve.status().applications and time.monotonic() < end:
        time.sleep(0.5)


def _wait_for_interrupt() -> None:
    """Return on Ctrl-C or SIGTERM, which `pipelines.shared.stopping` turns into `KeyboardInterrupt`."""
    say("stop it with Ctrl-C")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        say("finishing the open requests …")
