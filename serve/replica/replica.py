"""The Ray Serve deployment of an engine: one replica, one engine."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, replace

from ray import serve as ray_serve
from ray.util import metrics

from serve.config import ModelSection
from serve.errors import DeadlineError
from serve.observe.journeys import engine_stages
from serve.observe.tracing import Tracer
from serve.replica.adapters import ServedAdapters
from serve.replica.engine import ReplicaEngine
from serve.replica.messages import Served, State, Work
from serve.replica.native import NativeEngine
from serve.replica.vllm.engine import VllmReplicaEngine
from skipvision.engine import BASE, Chunk, Completion, Request, Statistics
from skipvision.errors import SkipVisionError
from skipvision.plan import TokenPlan

logger = logging.getLogger("ray.serve")

_STUCK_SECONDS = 60.0
"""An engine whose step takes longer than this is considered dead (s)."""


class EngineReplica:
    """Answers requests with one engine.

    Args:
        section: settings of the model and its engines.
        registry: MLflow's URI, for registered adapters.
        poll_seconds: time between checks for moved aliases and for adapters that failed to load (s).
        traces: arguments of `Tracer`.
    """

    # Ray Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self,
        section: ModelSection,
        registry: str | None,
        poll_seconds: float,
        traces: tuple[str | None, str],
    ) -> None:
        self._tracer, self._running = Tracer(*traces), False
        self._adapters = ServedAdapters(section.adapters, registry, poll_seconds)
        kind = VllmReplicaEngine if section.engine.backend == "vllm" else NativeEngine
        self._engine: ReplicaEngine = kind(section, _end_process)
        await self._engine.start()
        self._running = True
        await asyncio.to_thread(self._adapters.load, self._engine.adapters)
        self._gauges = _Gauges(section.served_name, self._engine.unmeasured)
        self._planning = asyncio.Lock()
        tasks = [self._watch_adapters(poll_seconds)] if self._adapters.registered else []
        self._tasks = [asyncio.get_event_loop().create_task(task) for task in (*tasks, self._report())]

    # --------------------------------------------------------------------------- called by ingresses

    async def stream(self, work: Work, *, whole: bool = False) -> AsyncIterator[Chunk | SkipVisionError]:
        """Yield the chunks of one request, or only the last one if ``whole``.

        If the engine refuses the request, the last item is its error. The error is not raised, because Ray
        would wrap it and the replica has not failed.
        """
        try:
            left = work.until - time.time()
            if left <= 0:
                raise DeadlineError
            request = self._named(replace(work.request, deadline=left))
            async with aclosing(self._engine.stream(request, work, whole=whole)) as chunks:
                async for chunk in self._sent(chunks, work.traceparent):
                    yield chunk
        except SkipVisionError as error:
            yield error

    async def _sent(self, chunks: AsyncIterator[Chunk], traceparent: str | None) -> AsyncIterator[Chunk]:
        """Yield chunks as the ingress gets them. Raise `DeadlineError` if there was no time for a token."""
        begun = False
        async for chunk in chunks:
            done = chunk.completion
            begun = begun or bool(done.usage.completion_tokens if done else chunk.token_ids)
            if chunk.finish_reason == "deadline" and not begun:
                raise DeadlineError
            if done is None:
                yield chunk
            else:
                self._trace(done, traceparent)
                # The ingress has the original request, so its tensors are not sent back.
                bare = replace(done.request, inputs=None, images=(), adjust=None, prompt="")
                yield replace(chunk, completion=replace(done, request=bare, error=_sendable(done.error)))

    async def answer(self, work: Work) -> Completion | SkipVisionError:
        """Return the whole answer, or the error if the engine refuses the request."""
        async for item in self.stream(work, whole=True):
            if isinstance(item, SkipVisionError):
                return item
            if item.completion is not None:
                return item.completion
        raise RuntimeError("the engine ended a request without completing it")

    async def plan(self, work: Work) -> TokenPlan | SkipVisionError:
        """Return the token plan of a request's prompt, or the error if the engine refuses the request."""
        # One at a time, so that running answers wait for at most one plan between two steps.
        async with self._planning:
            try:
                return await self._engine.plan(self._named(work.request), work.until)
            except SkipVisionError as error:
                return error

    def _named(self, request: Request) -> Request:
        """Return the request with the engine's name of its adapter."""
        name = request.adapter
        return replace(request, adapter=BASE if name is None else self._adapters.version(name).name)

    def _trace(self, done: Completion, parent: str | None) -> None:
        """Send the engine's stages of a finished request as spans."""
        submitted = time.time() - done.timing.total
        for name, begin, end in engine_stages(done.timing):
            self._tracer.start(name, parent, submitted + begin).end(at=submitted + end)

    async def served(self) -> Served:
        """Return the adapters and SkipConfigs that requests can use."""
        # Copies, because another thread changes both; `missing` first, so that no adapter is in neither.
        missing, versions = dict(self._adapters.missing), dict(self._adapters.versions)
        skip = await self._engine.configs()
        return Served(
            {name: version.source for name, version in versions.items()},
            {BASE: skip[BASE], **{name: skip[version.name] for name, version in versions.items()}},
            missing,
        )

    async def state(self) -> State:
        """Return the engine's state for routing and health checks."""
        return State(await self.statistics(), dict(self._adapters.missing))

    async def statistics(self) -> Statistics:
        """Return the engine's counters since it started."""
        return await self._engine.statistics()

    def seconds_since_step(self) -> float:
        """Return the seconds since the engine last finished a step or was idle."""
        return time.monotonic() - self._engine.stepped

    # ---------------------------------------------------------------------------- called by Ray Serve

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Report the load relative to the scarcer of rows and memory; 1 = full."""
        return {"load": load_of(await self._engine.statistics())}

    async def check_health(self) -> None:
        """Raise if the engine hangs; Ray Serve then replaces the replica."""
        if self.seconds_since_step() > _STUCK_SECONDS:
            raise RuntimeError(f"the engine has not finished a step for {self.seconds_since_step():.0f} s")

    def __del__(self) -> None:
        """Send the remaining spans, and end the engine. Ray Serve calls this before the process ends."""
        self._tracer.close()
        if self._running:
            self._engine.close()

    # -------------------------------------------------------------------------- background tasks

    async def _watch_adapters(self, seconds: float) -> None:
        while True:
            await asyncio.to_thread(self._adapters.update, self._engine.adapters)
            await asyncio.sleep(seconds)

    async def _report(self) -> None:
        while True:
            self._gauges.set(await self._engine.statistics())
            await asyncio.sleep(1.0)


def load_of(now: Statistics) -> float:
    """Return running and waiting sequences relative to the rows, or to the KV memory if that is scarcer."""
    sequences = now.running + now.waiting_answers
    bytes_each = now.kv_bytes_reserved / now.running if now.running else 0.0
    return max(sequences / now.max_sequences, sequences * bytes_each / now.kv_bytes_budget)


class _Gauges:
    """The counters of one engine as Ray metrics, which its node exports."""

    def __init__(self, model: str, unmeasured: frozenset[str]) -> None:
        self._unmeasured = unmeasured
        tags = {"model": model, "replica": ray_serve.get_replica_context().replica_tag}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._tags = tags

    def set(self, now: Statistics) -> None:
        numbers = {**asdict(now), "kv_occupancy": now.kv_bytes_used / now.kv_bytes_budget}
        for name, value in numbers.items():
            if name in self._unmeasured or not isinstance(value, (int, float)):
                continue
            if name not in self._gauges:
                self._gauges[name] = metrics.Gauge(
                    f"skipvision_engine_{name}",
                    description=f"{name} of the engine",
                    tag_keys=tuple(self._tags),
                )
            self._gauges[name].set(float(value), tags=self._tags)


def _end_process(error: BaseException) -> None:
    """End the process of a failed engine, which would still be sent requests as long as the process lived.

    Ray raises an error in the waiting ingresses, which retry on another engine, and starts a new replica.
    """
    logger.critical("the engine has failed: its process ends", exc_info=error)
    logging.shutdown()
    os._exit(1)


def _sendable(error: Exception | None) -> Exception | None:
    """Return an error that can be pickled: our own unchanged, others as a `RuntimeError`."""
    if error is None or isinstance(error, SkipVisionError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
