"""Whether every model has an engine that responds: the report at ``GET /healthz``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.serve.exceptions import BackPressureError

from serve.ingress.dispatch import QUERY_SECONDS, Engines

SLOW_SECONDS = 5.0
"""An engine whose last step is longer ago is reported as slow: it may hang (s)."""


class Health:
    """The state of a deployment's engines.

    Args:
        models: the engines of each base model by its name.
    """

    def __init__(self, models: Mapping[str, Engines]) -> None:
        self._models = models

    async def report(self) -> dict[str, Any]:
        """Return the state of each model; "ok" over all unless one is down.

        An idle model is not down: its first request starts an engine. Neither is an engine that cannot load
        an adapter yet: another engine could not load it either.
        """
        states = await asyncio.gather(*map(_state, self._models.values()))
        well = all(state["status"] != "down" for state in states)
        return {"status": "ok" if well else "down", "models": dict(zip(self._models, states, strict=True))}


async def _state(engines: Engines) -> dict[str, Any]:
    try:
        async with asyncio.timeout(QUERY_SECONDS):
            if await engines.idle():
                return {"status": "idle"}
            state = await engines.state()
    except (BackPressureError, TimeoutError) as error:
        return await _full_or_hanging(engines, error)
    except Exception as error:
        return _down(error)
    missing = {"not_loaded": state.missing} if state.missing else {}
    now = state.statistics
    return {"status": "ok", "running": now.running, "waiting": now.waiting, **missing}


async def _full_or_hanging(engines: Engines, error: Exception) -> dict[str, Any]:
    """Tell full engines from hanging ones. Neither has room for a question through Ray Serve's queue."""
    running, seconds = await engines.liveness()
    if not seconds:
        return _down(error)
    counts = {"engines": running, "answering": len(seconds)}
    if min(seconds) > SLOW_SECONDS:
        return {"status": "slow", **counts, "seconds": round(min(seconds), 1)}
    return {"status": "saturated", **counts}


def _down(error: Exception) -> dict[str, Any]:
    return {"status": "down", "reason": type(error).__name__}
