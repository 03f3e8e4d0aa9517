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


async def answering(application: str, deployment: str, seconds: float) -> int:
    """Replicas that call themselves healthy within a time."""
    begin = f"SERVE_REPLICA::{application}#{deployment}#"
    named = await asyncio.to_thread(list_named_actors, all_namespaces=True)
    replicas = [each for each in named if each["name"].startswith(begin)]
    asked = (_healthy(each, seconds) for each in replicas)
    return sum(await asyncio.gather(*asked))


async def _healthy(replica: dict[str, Any], seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            actor = await asyncio.to_thread(ray.get_actor, replica["name"], replica["namespace"])
            await actor.check_health.remote()
    except Exception:
        return False
    return True
