"""The engine as a Ray Serve deployment: one replica, one engine."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from ray import serve as ray_serve
from ray.util import metrics

from pipelines.engines.loading import arithmetic, load_base, load_processor
from pipelines.engines.thread import EngineThread
from serve.config import ModelSection
from serve.errors import DeadlineError
from serve.observe.journeys import engine_stages
from serve.observe.tracing import Tracer
from serve.replica.adapters import ServedAdapters
from serve.replica.grammar import Grammars
from serve.replica.messages import Served, State, Work
from serve.replica.stream import ask, stream
from skipvision import SkipConfig
from skipvision.engine import BASE, Chunk, Completion, Engine, Request, Statistics
from skipvision.errors import SkipVisionError
from skipvision.plan import TokenPlan

logger = logging.getLogger("ray.serve")

_STUCK_SECONDS = 60.0
"""An engine whose step takes longer than this is taken for dead."""


class EngineReplica:
    """Answers requests with one engine.

    Args:
        section: the model and how it is run.
        registry: MLflow's URI, for adapters from there.
        poll_seconds: time between looks whether an alias has moved, or an adapter can be had now.
        traces: arguments of `Tracer`.
    """

    def __init__(
        self,
        section: ModelSection,
        registry: str | None,
        poll_seconds: float,
        traces: tuple[str | None, str],
    ) -> None:
        self._tracer = Tracer(*traces)
        self._section = section
        self._adapters = ServedAdapters(section.adapters, registry, poll_seconds)
        self._engine = EngineThread(self._make, _end_process)
        self._engine.wait_until_ready()
        self._adapters.load(self._engine)
        self._gauges = _Gauges(section.served_name)
        self._planning = asyncio.Lock()
        tasks = [self._watch_adapters(poll_seconds)] if self._adapters.registered else []
        self._tasks = [asyncio.get_event_loop().create_task(task) for task in (*tasks, self._report())]

    # ------------------------------------------------------------------------ what the ingress calls

    async def stream(self, work: Work, *, whole: bool = False) -> AsyncIterator[Chunk | SkipVisionError]:
        """The chunks of one request, or only the last one; or, as the last item, why the engine refuses it.

        A refusal is an item and not raised: Ray would wrap it, and it is no failure of the replica.
        """
        request, written = work.request, False
        try:
            left = work.until - time.time()
            if left <= 0:
                raise DeadlineError
            request = replace(request, deadline=left)
            if work.schema is not None:
                adjuster = await asyncio.to_thread(self._grammars.adjuster, work.schema)
                request = replace(request, adjust=adjuster)
            async for chunk in stream(self._engine, self._named(request), whole=whole):
                done = chunk.completion
                written = written or bool(done.usage.completion_tokens if done else chunk.token_ids)
                if chunk.finish_reason == "deadline" and not written:
                    raise DeadlineError
                if done is None:
                    yield chunk
                else:
                    self._trace(done, work.traceparent)
                    # The request came from there; its tensors need not go back.
                    bare = replace(done.request, inputs=None, images=(), adjust=None, prompt="")
                    yield replace(chunk, completion=replace(done, request=bare, error=_sendable(done.error)))
        except SkipVisionError as error:
            yield error

    async def answer(self, work: Work) -> Completion | SkipVisionError:
        """The whole answer; or why there is none."""
        async for item in self.stream(work, whole=True):
            if isinstance(item, SkipVisionError):
                return item
            if item.completion is not None:
                return item.completion
        raise RuntimeError("the engine ended a request without completing it")

    async def plan(self, work: Work) -> TokenPlan | SkipVisionError:
        """What would become of the tokens of a request's prompt; or why that cannot be said."""
        # One after the other: answers that are being written wait for one of them at a time.
        async with self._planning:
            try:
                request = self._named(work.request)
                return await ask(self._engine, partial(_plan, request=request, until=work.until))
            except SkipVisionError as error:
                return error

    def _named(self, request: Request) -> Request:
        """The request with the engine's name for its adapter."""
        name = request.adapter
        return replace(request, adapter=BASE if name is None else self._adapters.version(name).name)

    def _trace(self, done: Completion, parent: str | None) -> None:
        """The engine's stages of a request that has just ended, as spans."""
        submitted = time.time() - done.timing.total
        for name, begin, end in engine_stages(done.timing):
            self._tracer.start(name, parent, submitted + begin).end(at=submitted + end)

    async def served(self) -> Served:
        """What can be asked for."""
        return await ask(self._engine, self._served)

    def _served(self, engine: Engine) -> Served:
        # Copies, for another thread changes them: at first what is missing, for it may be loaded just now.
        missing, versions = dict(self._adapters.missing), dict(self._adapters.versions)
        skip = engine.configs
        return Served(
            {name: version.source for name, version in versions.items()},
            {BASE: skip[BASE], **{name: skip[version.name] for name, version in versions.items()}},
            missing,
        )

    async def state(self) -> State:
        """How it is."""
        return State(await self.statistics(), dict(self._adapters.missing))

    async def statistics(self) -> Statistics:
        """Of the engine."""
        return await ask(self._engine, Engine.statistics)

    def seconds_since_step(self) -> float:
        """Seconds since the engine finished a step, or had nothing to do."""
        return time.monotonic() - self._engine.stepped

    # --------------------------------------------------------------------------- what Ray Serve calls

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How full the engine is, by what limits it: rows, or memory; 1 = no more fits beside what runs."""
        now = await ask(self._engine, Engine.statistics)
        return {"load": load_of(now)}

    async def check_health(self) -> None:
        """Raise if the engine hangs: Ray Serve then starts another replica."""
        if self.seconds_since_step() > _STUCK_SECONDS:
            raise RuntimeError(f"the engine has not finished a step for {self.seconds_since_step():.0f} s")

    def __del__(self) -> None:
        """Called before the process ends."""
        self._tracer.close()

    # --------------------------------------------------------------------------------------- making

    def _make(self) -> Engine:
        section = self._section
        device = torch.device("cuda" if section.scaling.gpus_per_engine else "cpu")
        dtype = arithmetic(section.dtype, device)
        model = load_base(section.path, dtype, section.attention, device)
        processor: Any = load_processor(section.path)
        skip = section.skip or SkipConfig.full()
        engine = Engine(model, processor, skip, **section.engine.model_dump())
        self._grammars = Grammars(processor.tokenizer, engine.vocabulary, sorted(engine.ending))
        return engine

    # ------------------------------------------------------------------------------------- meanwhile

    async def _watch_adapters(self, seconds: float) -> None:
        while True:
            await asyncio.to_thread(self._adapters.look, self._engine)
            await asyncio.sleep(seconds)

    async def _report(self) -> None:
        while True:
            self._gauges.set(await ask(self._engine, Engine.statistics))
            await asyncio.sleep(1.0)


def load_of(now: Statistics) -> float:
    """Answers that run and wait against those that can run, by rows; or by KV bytes if those are scarcer."""
    answers = now.running + now.waiting_answers
    bytes_each = now.kv_bytes_reserved / now.running if now.running else 0.0
    return max(answers / now.max_sequences, answers * bytes_each / now.kv_bytes_budget)


class _Gauges:
    """Ray's metrics of one engine, found at its node's metrics port."""

    def __init__(self, model: str) -> None:
        tags = {"model": model, "replica": ray_serve.get_replica_context().replica_tag}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._tags = tags

    def set(self, now: Statistics) -> None:
        numbers = {**asdict(now), "kv_occupancy": now.kv_bytes_used / now.kv_bytes_budget}
        for name, value in numbers.items():
            if not isinstance(value, (int, float)):
                continue
            if name not in self._gauges:
                self._gauges[name] = metrics.Gauge(
                    f"skipvision_engine_{name}",
                    description=f"{name} of the engine",
                    tag_keys=tuple(self._tags),
                )
            self._gauges[name].set(float(value), tags=self._tags)


def _plan(engine: Engine, request: Request, until: float) -> TokenPlan:
    # It has waited for other plans, and for a step.
    if time.time() >= until:
        raise DeadlineError
    return engine.plan(request)


def _end_process(error: BaseException) -> None:
    """An engine that has failed answers nothing more: as long as its process lived, it would be asked.

    Ray tells those who wait, who ask another engine, and starts a new one.
    """
    logger.critical("the engine has failed: its process ends", exc_info=error)
    logging.shutdown()
    os._exit(1)


def _sendable(error: Exception | None) -> Exception | None:
    """An error as it can leave this process: ours as they are, others by what they say."""
    if error is None or isinstance(error, SkipVisionError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
