"""Send requests to a model's engines through Ray Serve: deadlines, retries on another engine, streams."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ray import serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve import _compat
from serve.errors import DeadlineError
from serve.observe.journeys import Journey
from serve.replica.liveness import running_replicas, seconds_since_step
from serve.replica.messages import Served, State, Work
from serve.reporting import problem_of
from skipvision.engine import Chunk, Completion
from skipvision.errors import SkipVisionError
from skipvision.plan import TokenPlan

MAX_TRIES = 3
"""Max engines that one request is sent to, one after the other, if they die before its first token."""

GRACE_SECONDS = 2.0
"""Time that a request waits, after its deadline, for the engine's partial answer (s)."""

QUERY_SECONDS = 2.0
"""How long an engine may take to report its own state (s)."""


class Engines:
    """Sends requests to the engines of one model.

    Args:
        handle: Ray Serve's handle of their deployment.
        on_demand: whether the deployment may have no engine before the first request.
    """

    def __init__(self, handle: Any, on_demand: bool) -> None:
        self._handle = _compat.direct_calls(handle)
        self._on_demand = on_demand
        self._served: Served | None = None

    # ------------------------------------------------------------------------------------- requests

    async def answer(self, work: Work, journey: Journey) -> Completion:
        """Return a whole answer. Raise the engine's `SkipVisionError` if it refuses the request."""
        completion: Completion = await self._call("answer", work, journey, GRACE_SECONDS)
        return completion

    async def plan(self, work: Work, journey: Journey) -> TokenPlan:
        """Return the token plan of a prompt. Raise the engine's `SkipVisionError` if it refuses."""
        plan: TokenPlan = await self._call("plan", work, journey)
        return plan

    async def stream(self, work: Work, journey: Journey) -> AsyncIterator[Chunk]:
        """Yield an answer in chunks. Another engine takes over only before the first chunk."""
        engine, sent = self._handle.options(stream=True), False
        for last_try in _tries():
            items = engine.stream.remote(work)
            try:
                while (item := await _next_item(items, journey.until + GRACE_SECONDS)) is not None:
                    if isinstance(item, SkipVisionError):
                        raise item
                    sent = True
                    yield item
                return
            except RayActorError:
                if sent or last_try:
                    raise
                journey.count_retry()
            finally:
                with contextlib.suppress(BackPressureError):  # cancel() raises it a second time
                    items.cancel()

    async def _call(self, method: str, work: Work, journey: Journey, grace: float = 0.0) -> Any:
        call = getattr(self._handle, method).remote
        for last_try in _tries():
            try:
                async with deadline(journey.until + grace):
                    reply = await call(work)
                break
            except RayActorError:
                if last_try:
                    raise
                journey.count_retry()
        if isinstance(reply, SkipVisionError):
            raise reply
        return reply

    # ---------------------------------------------------------------------------------------- state

    async def served(self) -> Served | None:
        """Return what an engine offers; the last known reply if none answers in time."""
        if not await self.idle():
            with contextlib.suppress(
                TimeoutError, BackPressureError, DeploymentUnavailableError, RayActorError
            ):
                async with asyncio.timeout(QUERY_SECONDS):
                    self._served = await self._handle.served.remote()
        return self._served

    async def state(self) -> State:
        """Return an engine's state. Raise `BackPressureError` if all engines are full."""
        state: State = await self._handle.state.remote()
        return state

    async def idle(self) -> bool:
        """Return whether the model starts on demand and has no engine now. A call would start one."""
        if not self._on_demand:
            return False
        return not await asyncio.to_thread(running_replicas, *self._deployment)

    async def liveness(self) -> tuple[int, list[float]]:
        """Count the running engines, and return the seconds since the last step of those that respond.

        Full engines respond too: the calls bypass Ray Serve's request queue.
        """
        responses, running = await asyncio.gather(
            seconds_since_step(*self._deployment, QUERY_SECONDS),
            asyncio.to_thread(running_replicas, *self._deployment),
        )
        return running, responses

    @property
    def _deployment(self) -> tuple[str, str]:
        return ray_serve.get_replica_context().app_name, self._handle.deployment_name


@contextlib.asynccontextmanager
async def deadline(until: float) -> AsyncIterator[None]:
    """Raise `DeadlineError` at a `time.monotonic` time, and Ray's back-pressure errors as `Problem`."""
    try:
        async with asyncio.timeout_at(until):
            yield
    except TimeoutError as error:
        raise DeadlineError from error
    except (BackPressureError, DeploymentUnavailableError) as error:
        # Ray Serve installs its own handlers for these before ours; they respond in plain text.
        raise problem_of(error) from error


def unix_time(monotonic: float) -> float:
    """Convert a `time.monotonic` time of this process to Unix time, which other processes share."""
    return monotonic - time.monotonic() + time.time()


def _tries() -> Iterator[bool]:
    """Yield, for each attempt, whether it is the last."""
    yield from [*[False] * (MAX_TRIES - 1), True]


async def _next_item(items: Any, until: float) -> Chunk | SkipVisionError | None:
    """Return the next item of a stream, or None at its end.

    Each item has a timeout of its own: the first is awaited in another task than the rest, and
    `asyncio.timeout` is bound to the task that entered it.
    """
    async with deadline(until):
        item: Chunk | SkipVisionError | None = await anext(items, None)
    return item
