"""The CPUs and GPUs that a deployment reserves, and whether they are there. Ray waits for them silently."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ray import serve as ray_serve

from pipelines.shared.console import say
from serve.config import ServeConfig
from skipvision.errors import ResourceError

INGRESS_CPUS = 0.25
"""CPUs that each ingress reserves."""

_POLL_SECONDS = 5.0
_WAITS_FOR_RESOURCES = "to be scheduled"
"""A part of what Ray Serve (2.60.0) reports about a deployment after 30 seconds without resources."""


def check_capacity(config: ServeConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that the engines and the ingresses that run from the start fit on the nodes.

    Args:
        config: settings of the deployment.
        nodes: the resources of each node, which have no other work and do not become more.

    Raises:
        ResourceError: they do not fit, so the deployment would wait forever.
    """
    demands = [(INGRESS_CPUS, 0.0)] * config.ingresses
    for model in config.models:
        wanted = model.scaling
        demands += [(wanted.cpus_per_engine, wanted.gpus_per_engine)] * max(wanted.min_engines, 1)
    free = [[node.get("CPU", 0.0), node.get("GPU", 0.0)] for node in nodes]
    for cpus, gpus in sorted(demands, key=lambda demand: (demand[1], demand[0]), reverse=True):
        node = next((one for one in free if one[0] >= cpus - 1e-9 and one[1] >= gpus - 1e-9), None)
        if node is None:
            break
        node[0] -= cpus
        node[1] -= gpus
    else:
        return
    engines = len(demands) - config.ingresses
    need = " and ".join(_named([sum(one) for one in zip(*demands, strict=True)]))
    have = "; ".join(" and ".join(_named([node.get("CPU", 0.0), node.get("GPU", 0.0)])) for node in nodes)
    raise ResourceError(
        f"{engines} engine(s) of {len(config.models)} model(s) and {config.ingresses} ingress(es) reserve "
        f"{need} together, but there are {have or 'none'}: lower scaling.cpus_per_engine, "
        "scaling.gpus_per_engine or scaling.min_engines of the models, or serve fewer"
    )


def _named(amounts: Sequence[float]) -> Iterator[str]:
    cpus, gpus = amounts
    yield f"{cpus:g} CPUs"
    if gpus:
        yield f"{gpus:g} GPUs"


@contextmanager
def report_waiting(name: str) -> Iterator[None]:
    """Print once for each deployment of an application that it waits for resources, while the block runs."""
    done = threading.Event()

    def watch() -> None:
        reported: set[str] = set()
        while not done.wait(_POLL_SECONDS):
            try:
                application = ray_serve.status().applications.get(name)
            except Exception:  # Ray Serve is being stopped; the caller reports why
                return
            deployments = {} if application is None else application.deployments
            for deployment, status in deployments.items():
                if deployment not in reported and _WAITS_FOR_RESOURCES in status.message:
                    reported.add(deployment)
                    say(f"waiting for resources: {status.message}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_POLL_SECONDS)
