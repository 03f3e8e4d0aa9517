"""Count the CPUs that this process may use: in a container, fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the process's CPU affinity or its cgroup v2 quota, whichever is smaller; at least 1."""
    affine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, int(min([float(len(affine)), *_quotas(cgroups, own)])))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """Return the quotas (CPUs) of the process's control group and of its parents."""
    lines = own.read_text().splitlines() if own.exists() else []
    group = cgroups / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    files = [folder / "cpu.max" for folder in (group, *group.parents) if folder.is_relative_to(cgroups)]
    limits = [file.read_text().split() for file in files if file.exists()]
    return [int(quota) / int(period) for quota, period in limits if quota != "max"]
