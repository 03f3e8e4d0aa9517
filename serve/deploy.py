"""Putting an endpoint on a cluster, and saying when it answers; what `jobs/deploy.py` does."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from typing import Any

from ray import serve as ray_serve

from pipelines.cluster.session import ray_session
from pipelines.shared.paths import in_ray_job
from serve import _compat
from serve.app import application
from serve.config import Proxy, ServeConfig
from serve.ingress.dispatch import GRACE_SECONDS
from skipvision.errors import ConfigError, SkipVisionError

_ALWAYS = {
    # What makes an engine fail is said once, by `DeploymentError`; Ray's log has the tracebacks.
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front:middlewares",
    # Ray asks every 10 s whether a proxy lives; nobody can ask anything while none does.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # HAProxy knows at once that a replica is to go; Ray's 30 s are for load balancers that do not.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
_ENVIRONMENT: dict[Proxy, dict[str, str]] = {"ray": _ALWAYS, "haproxy": _ALWAYS | _HAPROXY}
"""Of the controller, which starts proxies and replicas in its own; what is set already is left."""

_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")
_RAISED = re.compile(r"^[\w.]*(?:Error|Exception)\b.*", re.MULTILINE)
"""An exception, as a traceback ends with it."""


class DeploymentError(SkipVisionError):
    """An application that did not come up."""


def run_deploy(config: ServeConfig) -> dict[str, Any]:
    """Deploy; returns where it answers, and what.

    On a cluster that is there already (a Ray job, or ``$RAY_ADDRESS``) the application stays when this
    process ends; ``serve shutdown`` ends it. A Ray that was started here lives as long as this process: until
    Ctrl-C or SIGTERM, after which the requests in hand are answered.

    Raises:
        ConfigError: settings that cannot be honoured.
        DeploymentError: the application did not come up.
    """
    app = application(config)
    joined = in_ray_job() or "RAY_ADDRESS" in os.environ
    with ray_session():
        start(config.host, config.port, config.proxy)
        # Of every start it says that it connects to a Serve that exists; all else is said here.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            ray_serve.run(app, name=config.name, route_prefix="/")
        except RuntimeError as error:
            reasons = "; ".join(_reasons(config.name)) or error
            raise DeploymentError(f"{config.name!r} did not come up: {reasons}") from error
        url = f"http://{config.host}:{config.port}"
        print(f"{', '.join(config.served())} at {url}/v1", flush=True)
        if not joined:
            _wait_for_interrupt()
            drain(config)
            ray_serve.shutdown()
    return {"url": url, "models": list(config.served())}


def start(host: str, port: int, proxy: Proxy = "ray") -> None:
    """Start Ray Serve where it does not run yet.

    Args:
        host: address that its proxies listen on.
        port: likewise.
        proxy: as `ServeConfig.proxy`.

    Raises:
        ConfigError: it runs at another address.
    """
    if _compat.serve_is_running():
        print("Ray Serve runs on this cluster already, and keeps the proxy that it has", flush=True)
    environment = {name: os.environ.get(name, value) for name, value in _ENVIRONMENT[proxy].items()}
    ray_serve.start(
        http_options={"host": host, "port": port},
        controller_options={"runtime_env": {"env_vars": environment}},
    )
    # One that ran before keeps its own address, whatever is asked for.
    running = _compat.serve_address()
    if running != (host, port):
        raise ConfigError(
            f"host = {host}, port = {port}: Ray Serve runs on this cluster already, at "
            f"{running.host}:{running.port}, and has one address: give that, or end it and all its "
            "applications with `serve shutdown` first"
        )


def _reasons(name: str) -> list[str]:
    """Why deployments of an application do not run; of a traceback, what it ends with."""
    application = ray_serve.status().applications.get(name)
    found = {} if application is None else application.deployments
    messages = {name: each.message for name, each in found.items() if each.status in _FAILED}
    return [f"{name}: {(_RAISED.findall(said) or [said])[-1]}" for name, said in messages.items()]


def drain(config: ServeConfig) -> None:
    """Take no more requests, and return when those in hand are answered, or their time is over."""
    # ray_serve.shutdown() alone ends the proxies at once; ray_serve.delete() waits a minute at most.
    _compat.begin_delete(config.name)
    end = time.monotonic() + config.limits.request_seconds + GRACE_SECONDS
    while config.name in ray_serve.status().applications and time.monotonic() < end:
        time.sleep(0.5)


def _wait_for_interrupt() -> None:
    """Until Ctrl-C, or SIGTERM, which `pipelines.shared.stopping` makes the same."""
    print("Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("answering the requests in hand …", flush=True)
