"""Putting an endpoint on a cluster, and saying when it answers; what `jobs/deploy.py` does."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from ray import serve as ray_serve

from pipelines.cluster import ray_session
from pipelines.paths import in_ray_job
from serve.api import GRACE_SECONDS
from serve.app import application
from serve.config import ServeConfig
from skipvision.errors import SkipVisionError


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
        ray_serve.start(http_options={"host": config.host, "port": config.port})
        try:
            ray_serve.run(app, name=config.name, route_prefix="/")
        except RuntimeError as error:
            raise DeploymentError(f"{config.name!r} did not come up: {error}") from error
        url = f"http://{config.host}:{config.port}"
        print(f"{', '.join(config.served())} at {url}/v1", flush=True)
        if not joined:
            _wait_for_interrupt()
            drain(config)
            ray_serve.shutdown()
    return {"url": url, "models": list(config.served())}


def drain(config: ServeConfig) -> None:
    """Take no more requests, and return when those in hand are answered, or their time is over."""
    # ray_serve.shutdown() alone ends the proxies at once; ray_serve.delete() waits a minute at most.
    ray_serve.delete(config.name, _blocking=False)
    end = time.monotonic() + config.limits.request_seconds + GRACE_SECONDS
    while config.name in ray_serve.status().applications and time.monotonic() < end:
        time.sleep(0.5)


def _wait_for_interrupt() -> None:
    """Until Ctrl-C, or SIGTERM, which `pipelines.stopping` makes the same."""
    print("Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("answering the requests in hand …", flush=True)
