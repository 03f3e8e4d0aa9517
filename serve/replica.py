"""The engine as a Ray Serve deployment: one replica, one engine."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import serve as ray_serve
from ray.util import metrics

from pipelines.engine_thread import EngineThread
from pipelines.loading import arithmetic, load_base, load_processor
from pipelines.tracking import fetch_model
from serve.config import ModelSection
from serve.engine_stream import ask, stream
from serve.grammar import Grammars
from serve.journeys import engine_stages
from serve.tracing import Tracer
from skipvision import SkipConfig, load_adapter, read_adapter
from skipvision.engine import BASE, Chunk, Completion, Engine, Request, Statistics
from skipvision.errors import ConfigError, SkipVisionError
from skipvision.plan import TokenPlan

logger = logging.getLogger("ray.serve")

_STUCK_SECONDS = 60.0
"""An engine whose step takes longer than this is taken for dead."""


@dataclass(frozen=True)
class Work:
    """A request on its way from an ingress to an engine; what an engine alone can make is still missing.

    Attributes:
        request: prepared.
        schema: JSON schema that the answers follow, as JSON.
        traceparent: span that the engine's are part of.
    """

    request: Request
    schema: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True)
class Version:
    """An adapter as it is served now.

    Attributes:
        name: the engine's, which knows several versions while one takes over from another.
        source: folder, or registered model with its version.
        folder: on this machine.
    """

    name: str
    source: str
    folder: Path


@dataclass(frozen=True)
class Served:
    """What an engine offers.

    Attributes:
        adapters: where each comes from, with the version of those in a registry.
        skip: SkipConfig of each adapter, and of the base model under "__base__".
    """

    adapters: dict[str, str] = field(default_factory=dict)
    skip: dict[str, SkipConfig] = field(default_factory=dict)


class EngineReplica:
    """Answers requests with one engine.

    Args:
        section: the model and how it is run.
        registry: MLflow's URI, for adapters from there.
        poll_seconds: time between looks whether an alias has moved.
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
        self._section, self._registry = section, registry
        self._versions: dict[str, Version] = {}
        self._retired: set[str] = set()
        self._folders = tempfile.TemporaryDirectory(prefix="skipvision-adapters-")
        self._engine = EngineThread(self._make)
        self._engine.wait_until_ready()
        self._gauges = _Gauges(section.served_name)
        self._planning = asyncio.Lock()
        tasks = [self._watch_adapters(poll_seconds)] if self._from_registry() else []
        self._tasks = [asyncio.get_event_loop().create_task(task) for task in (*tasks, self._report())]

    # ------------------------------------------------------------------------ what the ingress calls

    async def stream(self, work: Work) -> AsyncIterator[Chunk | SkipVisionError]:
        """The chunks of one request; or, as the last item, why the engine refuses it.

        A refusal is an item and not raised: Ray would wrap it, and it is no failure of the replica.
        """
        request = work.request
        try:
            if work.schema is not None:
                adjuster = await asyncio.to_thread(self._grammars.adjuster, work.schema)
                request = replace(request, adjust=adjuster)
            async for chunk in stream(self._engine, self._named(request)):
                done = chunk.completion
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
        async for item in self.stream(work):
            if isinstance(item, SkipVisionError):
                return item
            if item.completion is not None:
                return item.completion
        raise RuntimeError("the engine ended a request without completing it")

    async def plan(self, work: Work) -> TokenPlan | SkipVisionError:
        """What would become of the tokens of a request's prompt; or why that cannot be said."""
        request = self._named(work.request)
        # One after the other: answers that are being written wait for one of them at a time.
        async with self._planning:
            try:
                return await ask(self._engine, lambda engine: engine.plan(request))
            except SkipVisionError as error:
                return error

    def _named(self, request: Request) -> Request:
        """The request with the engine's name for its adapter."""
        name = request.adapter
        return replace(request, adapter=BASE if name is None else self._versions[name].name)

    def _trace(self, done: Completion, parent: str | None) -> None:
        """The engine's stages of a request that has just ended, as spans."""
        submitted = time.time() - done.timing.total
        for name, begin, end in engine_stages(done.timing):
            self._tracer.start(name, parent, submitted + begin).end(at=submitted + end)

    async def served(self) -> Served:
        """What can be asked for."""
        skip = await ask(self._engine, lambda engine: dict(engine.configs))
        versions = self._versions.items()
        return Served(
            {name: version.source for name, version in versions},
            {BASE: skip[BASE], **{name: skip[version.name] for name, version in versions}},
        )

    async def statistics(self) -> Statistics:
        """Of the engine."""
        return await ask(self._engine, Engine.statistics)

    # --------------------------------------------------------------------------- what Ray Serve calls

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How full the engine is, by what limits it: rows, or memory; 1 = no more fits beside what runs."""
        now = await ask(self._engine, Engine.statistics)
        return {"load": load_of(now)}

    async def check_health(self) -> None:
        """Raise if the engine has died or hangs: Ray Serve then starts another replica."""
        if self._engine.failure is not None:
            raise RuntimeError(f"the engine has failed: {self._engine.failure}")
        still = time.monotonic() - self._engine.stepped
        if still > _STUCK_SECONDS:
            raise RuntimeError(f"the engine has not finished a step for {still:.0f} s")

    def __del__(self) -> None:
        """Called before the process ends."""
        self._tracer.close()

    # --------------------------------------------------------------------------------------- making

    def _make(self) -> Engine:
        section = self._section
        device = torch.device("cuda" if section.scaling.gpus_per_engine else "cpu")
        dtype = arithmetic(section.dtype, device)
        model = load_base(section.path, dtype, section.attention, device)
        found = {name: self._fetch(name, source) for name, source in section.adapters.items()}
        skip = section.skip
        for version in list(found.values())[:1]:
            model = load_adapter(model, version.folder, name=version.name).to(device, dtype)
            skip = skip or read_adapter(version.folder)["skip"]
        processor: Any = load_processor(section.path)
        engine = Engine(model, processor, skip or SkipConfig.full(), **section.engine.model_dump())
        for version in list(found.values())[1:]:
            engine.add_adapter(version.name, version.folder)
        self._versions = found
        self._grammars = Grammars(processor.tokenizer, engine.vocabulary, sorted(engine.ending))
        return engine

    # ------------------------------------------------------------------------------------- adapters

    def _from_registry(self) -> dict[str, str]:
        return {
            name: source for name, source in self._section.adapters.items() if source.startswith("models:/")
        }

    def _fetch(self, name: str, source: str) -> Version:
        """An adapter's folder on this machine, of the version that is to be served now."""
        folder = Path(source)
        if source.startswith("models:/"):
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._folders.name)) / "adapter"
            source = fetch_model(self._registry or "", source, folder)
        return Version(f"{name}@{source.rsplit('/', 1)[-1]}".replace(".", "_"), source, folder)

    async def _watch_adapters(self, seconds: float) -> None:
        """Serve the version that an alias names, also when it moves; the old one while it has requests."""
        while True:
            await asyncio.sleep(seconds)
            for name, source in self._from_registry().items():
                try:
                    await self._renew(name, source)
                except Exception:
                    # What is served goes on being served; the next look may do better.
                    logger.warning("adapter %s (%s) could not be renewed", name, source, exc_info=True)
            await self._forget_retired()

    async def _renew(self, name: str, source: str) -> None:
        new, old = await asyncio.to_thread(self._fetch, name, source), self._versions[name]
        if new.source == old.source:
            return
        await ask(self._engine, lambda engine: engine.add_adapter(new.name, new.folder))
        self._versions[name] = new
        self._retired.add(old.name)
        logger.info("adapter %s: %s in place of %s", name, new.source, old.source)

    async def _forget_retired(self) -> None:
        """What has no requests any more goes; the engine keeps the first adapter, which it was made with."""
        for old in list(self._retired):
            with suppress(ConfigError):
                await ask(self._engine, partial(Engine.remove_adapter, name=old))
                self._retired.remove(old)

    async def _report(self) -> None:
        while True:
            self._gauges.set(await ask(self._engine, Engine.statistics))
            await asyncio.sleep(1.0)


def load_of(now: Statistics) -> float:
    """Requests that run and wait against those that can run, by rows; or by KV bytes if those are scarcer."""
    rows = (now.running + now.waiting) / now.max_sequences
    bytes_each = now.kv_bytes_reserved / now.running if now.running else 0.0
    memory = (now.running + now.waiting) * bytes_each / now.kv_bytes_budget
    return max(rows, memory)


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


def _sendable(error: Exception | None) -> Exception | None:
    """An error as it can leave this process: ours as they are, others by what they say."""
    if error is None or isinstance(error, SkipVisionError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
