"""Every use of a private name of Ray, Starlette or FastAPI, with the version it was last seen in.

None of these names is a promise of the library that has it: read this file when upgrading one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import ray
import ray.exceptions
from ray import serve as ray_serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE  # Ray 2.60.0
from ray.util import list_named_actors

T = TypeVar("T")


class Address(NamedTuple):
    """Where Ray Serve's proxies listen."""

    host: str
    port: int


def direct_calls(handle: Any) -> Any:
    """Return a deployment handle whose calls go straight to the replica, not through Ray's object store.

    Ray 2.60.0: the option ``_by_reference`` of `DeploymentHandle.options`.
    """
    return handle.options(_by_reference=False)


def serve_is_running() -> bool:
    """Return whether Ray Serve runs on this cluster. The public API would start it.

    Ray 2.60.0: the controller's actor name and namespace.
    """
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def serve_address() -> Address:
    """Return where the running Ray Serve listens.

    Ray 2.60.0: the controller's method ``get_http_config``.
    """
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    options: Any = ray.get(controller.get_http_config.remote())
    return Address(options.host, options.port)


def begin_delete(application: str) -> None:
    """Start deleting an application without waiting; the public call waits for one minute and then gives up.

    Ray 2.60.0: the parameter ``_blocking`` of `serve.delete`.
    """
    ray_serve.delete(application, _blocking=False)


def stop_serve(seconds: float = 30.0) -> None:
    """Stop Ray Serve, as `serve.shutdown` does, whose call is repeated when the controller has ended itself.

    Ray then prints that the call failed. Ray 2.60.0: the controller's method ``graceful_shutdown``.
    """
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        call: Any = controller.graceful_shutdown.options(max_task_retries=0)
        ray.get(call.remote(), timeout=seconds)


async def call_in_replicas(
    application: str, deployment: str, function: Callable[[Any], T], seconds: float
) -> list[T]:
    """Run a function of the deployed object in each replica, past Ray Serve's limit on ongoing requests.

    Replicas that fail their health check, or take longer than ``seconds``, are left out.

    Ray 2.60.0: the names of replica actors, their method ``check_health``, and ``__ray_call__`` of actors.
    """

    def run(_actor: Any) -> T:
        return function(ray_serve.get_replica_context().servable_object)

    async def call(name: dict[str, Any]) -> list[T]:
        try:
            async with asyncio.timeout(seconds):
                actor = await asyncio.to_thread(ray.get_actor, name["name"], name["namespace"])
                await actor.check_health.remote()
                return [await actor.__ray_call__.remote(run)]
        except Exception:
            return []

    prefix = f"SERVE_REPLICA::{application}#{deployment}#"
    names = await asyncio.to_thread(list_named_actors, all_namespaces=True)
    found = await asyncio.gather(*(call(name) for name in names if name["name"].startswith(prefix)))
    return [result for results in found for result in results]


def route_template(scope: Any) -> str:
    """Return the path template of the route that answered a request; "none" if no route matched.

    FastAPI 0.165.0 with Starlette 1.10.0: the key ``route`` of the scope.
    """
    template: str = getattr(scope.get("route"), "path", "none")
    return template
