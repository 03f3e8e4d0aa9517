"""CPUs and GPUs of the engines, next to the readers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipelines.caption.config import ScalingSection
from pipelines.cluster.resources import fitting_workers
from skipvision.errors import ResourceError


def engine_resources(nodes: Sequence[Mapping[str, float]], scaling: ScalingSection) -> dict[str, float]:
    """Return the CPUs and GPUs of each engine.

    On a cluster that grows on demand an engine gets what the settings say, by default one CPU. Otherwise,
    without settings, an engine gets a GPU and one CPU if the cluster has GPUs. Otherwise it gets the largest
    multiple of half a CPU with which all engines and readers fit.

    Raises:
        ResourceError: engines and readers do not fit; Ray would wait for ever.
    """
    if scaling.autoscaling:
        return {"CPU": scaling.cpus_per_worker or 1.0, "GPU": scaling.gpus_per_worker or 0.0}
    gpus = scaling.gpus_per_worker
    if gpus is None:
        gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes))
    most = max((node.get("CPU", 0) for node in nodes), default=0)
    shares = [half / 2 for half in range(max(math.floor(2 * most), 1), 0, -1)]
    if scaling.cpus_per_worker is not None:
        shares = [scaling.cpus_per_worker]
    elif gpus:
        shares = [1.0]
    for share in shares:
        demand = {"CPU": share, "GPU": float(gpus)}
        if _fit(nodes, demand, scaling):
            return demand
    has = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
    raise ResourceError(
        f"{scaling.workers} engines with {demand['CPU']:g} CPU and {demand['GPU']:g} GPU each and "
        f"{scaling.readers} readers with {scaling.cpus_per_reader:g} CPU each are more than the "
        f"cluster holds (its nodes: {has or 'none'}). Lower scaling.workers, scaling.cpus_per_worker, "
        "scaling.gpus_per_worker or scaling.readers, add nodes, or set scaling.autoscaling"
    )


def _fit(nodes: Sequence[Mapping[str, float]], demand: Mapping[str, float], scaling: ScalingSection) -> bool:
    """Return whether the engines fit, and the readers on the CPUs that are left."""
    left, engines = [], scaling.workers
    for node in nodes:
        here = min(engines, fitting_workers([node], demand))
        engines -= here
        left.append({"CPU": node.get("CPU", 0) - here * demand["CPU"]})
    return engines == 0 and fitting_workers(left, {"CPU": scaling.cpus_per_reader}) >= scaling.readers
