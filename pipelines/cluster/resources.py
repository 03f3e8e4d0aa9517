"""The resources of a cluster's nodes, and how many workers fit on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.cluster.cpus import usable_cpus
from skipvision.errors import ResourceError


def node_resources() -> list[dict[str, float]]:
    """Return the total resources of each live node; without a cluster, those of a Ray started here."""
    import ray

    if not ray.is_initialized():
        import torch

        return [{"CPU": float(usable_cpus()), "GPU": float(torch.cuda.device_count())}]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fitting_workers(nodes: Sequence[Mapping[str, float]], demand: Mapping[str, float]) -> int:
    """Return how many workers with this demand fit on the nodes; a worker runs on one node."""
    needed = {name: amount for name, amount in demand.items() if amount > 0}
    if not needed:
        raise ValueError(f"demand={dict(demand)} is empty: any number of workers fits")
    return sum(min(int(node.get(name, 0) / amount) for name, amount in needed.items()) for node in nodes)


def worker_resources(
    nodes: Sequence[Mapping[str, float]], workers: int, cpus: int | None, gpus: int | None
) -> dict[str, float]:
    """Return the resources of each worker: ``{"CPU": …, "GPU": …}``.

    Args:
        nodes: resources of each node.
        workers: how many workers must fit.
        cpus: CPUs of each worker; None = the largest equal share.
        gpus: GPUs of each worker; None = 1 if any node has one, otherwise 0.

    Raises:
        ResourceError: the workers do not fit. Ray would wait forever.
    """
    if gpus is None:
        gpus = int(any(node.get("GPU", 0) >= 1 for node in nodes))
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    for share in [cpus] if cpus is not None else range(max(largest, 1), 0, -1):
        demand = {"CPU": float(share), "GPU": float(gpus)}
        if fitting_workers(nodes, demand) >= workers:
            return demand
    listed = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
    raise ResourceError(
        f"{workers} workers with {demand['CPU']:g} CPU and {demand['GPU']:g} GPU each do not fit: the "
        f"cluster holds {fitting_workers(nodes, demand)} (its nodes: {listed or 'none'}). Lower "
        "scaling.workers, scaling.cpus_per_worker or scaling.gpus_per_worker, or add nodes"
    )
