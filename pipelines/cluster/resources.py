"""What the nodes of a cluster have, and how many workers fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.cluster.cpus import usable_cpus
from skipvision.errors import ResourceError


def node_resources() -> list[dict[str, float]]:
    """What each living node of the cluster has in total; without one, what a Ray started here would have."""
    import ray

    if not ray.is_initialized():
        import torch

        return [{"CPU": float(usable_cpus()), "GPU": float(torch.cuda.device_count())}]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fitting_workers(nodes: Sequence[Mapping[str, float]], demand: Mapping[str, float]) -> int:
    """How many workers that need ``demand`` each fit on the nodes; a worker is never split over two."""
    needed = {name: amount for name, amount in demand.items() if amount > 0}
    if not needed:
        raise ValueError("a worker that needs nothing fits any number of times")
    return sum(min(int(node.get(name, 0) / amount) for name, amount in needed.items()) for node in nodes)


def worker_resources(
    nodes: Sequence[Mapping[str, float]], workers: int, cpus: int | None, gpus: int | None
) -> dict[str, float]:
    """What each of the workers gets; refused now if the cluster cannot hold them, as Ray would wait for ever.

    ``cpus`` null shares all CPUs out evenly; ``gpus`` null is one if the cluster has any, else none.
    """
    if gpus is None:
        gpus = int(any(node.get("GPU", 0) >= 1 for node in nodes))
    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    # With nothing prescribed, the largest share of CPUs with which all workers still fit.
    for share in [cpus] if cpus is not None else range(max(most, 1), 0, -1):
        demand = {"CPU": float(share), "GPU": float(gpus)}
        if fitting_workers(nodes, demand) >= workers:
            return demand
    has = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
    fit = fitting_workers(nodes, demand)
    raise ResourceError(
        f"{workers} workers with {demand['CPU']:g} CPU and {demand['GPU']:g} GPU each were asked for, but "
        f"the cluster holds {fit} (its nodes: {has or 'none'}). Lower scaling.workers, "
        "scaling.cpus_per_worker or scaling.gpus_per_worker, or add nodes"
    )
