"""Whether every model has an engine that responds: the report at ``GET /healthz``."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray.serve.exceptions import BackPressureError

from serve.ingress.catalogue import ServedModel
from serve.ingress.dispatch import QUERY_SECONDS, Engines
from serve.ingress.preparation import Preparer

SLOW_SECONDS = 5.0
"""An engine whose last step is longer ago is reported as slow: it may hang (s)."""

TEMPLATE_SECONDS = 1.0
"""A chat template that has taken longer for one prompt is reported as slow: it may never end (s)."""


class Health:
    """The state of a deployment's engines, and of the preparation of requests in this ingress.

    Args:
        models: each base model by its name.
        preparer: decodes the requests' images.
    """

    def __init__(self, models: Mapping[str, ServedModel], preparer: Preparer) -> None:
        self._models, self._preparer = models, preparer

    async def report(self) -> dict[str, Any]:
        """Return the state of each model. The overall status is "ok" unless a model is down.

        An idle model is not down: its first request starts an engine. Neither is an engine that cannot load
        an adapter yet: another engine could not load it either. A model whose chat template takes long is
        slow, whatever its engines do.
        """
        states = await asyncio.gather(*map(_state, self._models.values()))
        well = all(state["status"] != "down" for state in states)
        report: dict[str, Any] = {
            "status": "ok" if well else "down",
            "models": dict(zip(self._models, states, strict=True)),
        }
        requests, threads = self._preparer.requests, self._preparer.threads
        if requests > threads:
            report["preparation"] = {"status": "saturated", "requests": requests, "threads": threads}
        return report


async def _state(model: ServedModel) -> dict[str, Any]:
    state = await _engine_state(model.engines)
    if state["status"] == "down" or model.rendering.busy_seconds < TEMPLATE_SECONDS:
        return state
    seconds = round(model.rendering.busy_seconds, 1)
    template = {"requests": model.rendering.requests, "seconds": seconds}
    return {**state, "status": "slow", "chat_template": template}


async def _engine_state(engines: Engines) -> dict[str, Any]:
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
    """Distinguish full engines from hanging ones. Neither has room for a query through Ray Serve's queue."""
    running, seconds = await engines.liveness()
    if not seconds:
        return _down(error)
    counts = {"engines": running, "answering": len(seconds)}
    if min(seconds) > SLOW_SECONDS:
        return {"status": "slow", **counts, "seconds": round(min(seconds), 1)}
    return {"status": "saturated", **counts}


def _down(error: Exception) -> dict[str, Any]:
    return {"status": "down", "reason": type(error).__name__}
