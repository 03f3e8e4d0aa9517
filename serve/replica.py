"""The engine as a Ray Serve deployment: one replica, one engine."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace
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
from skipvision import SkipConfig, load_adapter, read_adapter
from skipvision.engine import BASE, Chunk, Completion, Engine, Request, Statistics
from skipvision.errors import SkipVisionError
from skipvision.plan import TokenPlan

logger = logging.getLogger("ray.serve")

_STUCK_SECONDS = 60.0
"""An engine whose step takes longer than this is taken for dead."""


@dataclass(frozen=True)
class Work:
    """A request on its way from an ingress to an engine; what an engine alone can make is still missing.

    Attributes:
        request: prepared.
        schema: JSON schema that the answers follow.
    """

    request: Request
    schema: dict[str, Any] | None = None


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
    """

    def __init__(self, section: ModelSection, registry: str | None, poll_seconds: float) -> None:
        self._section, self._registry = section, registry
        self._sources: dict[str, str] = {}
        self._names: dict[str, str] = {}
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
                request = replace(request, adjust=self._grammars.adjuster(work.schema))
            async for chunk in stream(self._engine, self._named(request)):
                done = chunk.completion
                if done is None:
                    yield chunk
                else:
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

    async def plan(self, request: Request) -> TokenPlan | SkipVisionError:
        """What would become of the tokens of a prepared request; or why that cannot be said."""
        request = self._named(request)
        # One after the other: answers that are being written wait for one of them at a time.
        async with self._planning:
            try:
                return await ask(self._engine, lambda engine: engine.plan(request))
            except SkipVisionError as error:
                return error

    async def served(self) -> Served:
        """What can be asked for."""
        skip = await ask(self._engine, lambda engine: dict(engine.configs))
        names = {inner: outer for outer, inner in self._names.items()}
        return Served(dict(self._sources), {names.get(name, name): config for name, config in skip.items()})

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

    # --------------------------------------------------------------------------------------- making

    def _make(self) -> Engine:
        section = self._section
        device = torch.device("cuda" if section.scaling.gpus_per_engine else "cpu")
        dtype = arithmetic(section.dtype, device)
        model = load_base(section.path, dtype, section.attention, device)
        folders = {name: self._fetch(name, source) for name, source in section.adapters.items()}
        skip = section.skip
        for name, folder in list(folders.items())[:1]:
            model = load_adapter(model, folder, name=self._inner(name)).to(device, dtype)
            skip = skip or read_adapter(folder)["skip"]
        processor: Any = load_processor(section.path)
        engine = Engine(model, processor, skip or SkipConfig.full(), **section.engine.model_dump())
        for name, folder in list(folders.items())[1:]:
            engine.add_adapter(self._inner(name), folder)
        self._grammars = Grammars(processor.tokenizer, engine.vocabulary, sorted(engine.ending))
        return engine

    def _named(self, request: Request) -> Request:
        """The request with the engine's name for its adapter."""
        name = request.adapter
        return replace(request, adapter=BASE if name is None else self._names.get(name, name))

    def _inner(self, name: str) -> str:
        """The engine's name for the version of an adapter that is served now."""
        inner = f"{name}@{self._sources[name].rsplit('/', 1)[-1]}".replace(".", "_")
        self._names[name] = inner
        return inner

    # ------------------------------------------------------------------------------------- adapters

    def _from_registry(self) -> dict[str, str]:
        return {
            name: source for name, source in self._section.adapters.items() if source.startswith("models:/")
        }

    def _fetch(self, name: str, source: str) -> Path:
        """An adapter's folder on this machine; notes where it comes from."""
        if not source.startswith("models:/"):
            self._sources[name] = source
            return Path(source)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._folders.name)) / "adapter"
        self._sources[name] = fetch_model(self._registry or "", source, folder)
        return folder

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

    async def _renew(self, name: str, source: str) -> None:
        before, old = self._sources[name], self._names[name]
        folder = await asyncio.to_thread(self._fetch, name, source)
        if self._sources[name] == before:
            return
        inner = self._inner(name)
        await ask(self._engine, lambda engine: engine.add_adapter(inner, folder))
        logger.info("adapter %s: %s in place of %s", name, self._sources[name], before)
        while True:
            try:
                await ask(self._engine, lambda engine: engine.remove_adapter(old))
                return
            except SkipVisionError:
                await asyncio.sleep(1.0)

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
        for name, value in asdict(now).items():
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
