"""How many CPUs this process may use, which in a container is fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The CPUs that the process may run on, and no more than its quota (cgroup v2) allows; at least one."""
    affine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, int(min([float(len(affine)), *_quotas(cgroups, own)])))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """CPUs at a time that the process's control group may use, and each limited one around it."""
    lines = own.read_text().splitlines() if own.exists() else []
    group = cgroups / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    files = [folder / "cpu.max" for folder in (group, *group.parents) if folder.is_relative_to(cgroups)]
    limits = [file.read_text().split() for file in files if file.exists()]
    return [int(quota) / int(period) for quota, period in limits if quota != "max"]
