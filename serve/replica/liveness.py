"""Query which engines are alive. These calls get through even while all engines are full."""

from __future__ import annotations

from typing import Any

from ray import serve as ray_serve

from serve._compat import call_in_replicas


def running_replicas(application: str, deployment: str) -> int:
    """Count the running replicas of a deployment. A call through its handle would start one."""
    states = ray_serve.status().applications[application].deployments[deployment].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


async def seconds_since_step(application: str, deployment: str, timeout: float) -> list[float]:
    """Return, for each replica that responds in time, the seconds since its engine finished a step."""
    return await call_in_replicas(application, deployment, _seconds_since_step, timeout)


def _seconds_since_step(replica: Any) -> float:
    return float(replica.seconds_since_step())
