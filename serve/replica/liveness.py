"""Which engines live: Ray Serve's own questions, which are answered however many requests there are."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray import serve as ray_serve
from ray.util import list_named_actors


def running(application: str, deployment: str) -> int:
    """Replicas that run; a call would start one where there is none."""
    states = ray_serve.status().applications[application].deployments[deployment].replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


async def still(application: str, deployment: str, seconds: float) -> list[float]:
    """Of each replica that calls itself healthy within a time: seconds since its engine finished a step."""
    begin = f"SERVE_REPLICA::{application}#{deployment}#"
    named = await asyncio.to_thread(list_named_actors, all_namespaces=True)
    replicas = [each for each in named if each["name"].startswith(begin)]
    found = await asyncio.gather(*(_still(each, seconds) for each in replicas))
    return [each for each in found if each is not None]


async def _still(replica: dict[str, Any], seconds: float) -> float | None:
    try:
        async with asyncio.timeout(seconds):
            actor = await asyncio.to_thread(ray.get_actor, replica["name"], replica["namespace"])
            await actor.check_health.remote()
            return float(await actor.__ray_call__.remote(_engine_still))
    except Exception:
        return None


def _engine_still(actor: Any) -> float:
    """In the replica's process, whose own methods Ray Serve calls only while there is room for a request."""
    replica: Any = ray_serve.get_replica_context().servable_object
    return float(replica.still())
