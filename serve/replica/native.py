"""The library's own engine as the engine of a replica: it runs in a thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipelines.engines.loading import arithmetic, load_base, load_processor
from pipelines.engines.thread import EngineThread
from pipelines.shared.sections import EngineSection
from serve.config import ModelSection
from serve.errors import DeadlineError
from serve.replica.grammar import Grammars
from serve.replica.messages import Work
from serve.replica.stream import call, stream
from skipvision import SkipConfig
from skipvision.engine import Chunk, Engine, Request, Statistics
from skipvision.exporting.load import attach_as_exported
from skipvision.plan import TokenPlan


class NativeAdapters:
    """The adapters of an engine that runs in a thread.

    Args:
        thread: of the engine.
    """

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread

    def names(self) -> Sequence[str]:
        """Return the names of the base model and of the loaded adapters."""
        return self._thread.call(lambda engine: engine.adapters).result()

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter from its folder."""
        self._thread.call(partial(Engine.add_adapter, name=name, folder=folder)).result()

    def remove(self, name: str) -> None:
        """Remove an adapter. Raise `ConfigError` while it has requests."""
        self._thread.call(partial(Engine.remove_adapter, name=name)).result()


class NativeEngine:
    """A `skipvision.engine.Engine` in a thread; see `ReplicaEngine`.

    Args:
        section: settings of the model and its engines.
        died: called in the engine's thread with its failure.
    """

    unmeasured = frozenset[str]()

    def __init__(self, section: ModelSection, died: Callable[[BaseException], None]) -> None:
        self._section = section
        self._thread = EngineThread(self._make, died)
        self.adapters = NativeAdapters(self._thread)

    @property
    def stepped(self) -> float:
        return self._thread.stepped

    async def start(self) -> None:
        await asyncio.to_thread(self._thread.wait_until_ready)

    async def stream(self, request: Request, work: Work, *, whole: bool) -> AsyncGenerator[Chunk, None]:
        if work.schema is not None:
            adjuster = await asyncio.to_thread(self._grammars.adjuster, work.schema)
            request = replace(request, adjust=adjuster)
        async with aclosing(stream(self._thread, request, whole=whole)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def plan(self, request: Request, until: float) -> TokenPlan:
        return await call(self._thread, partial(_plan, request=request, until=until))

    async def configs(self) -> Mapping[str, SkipConfig]:
        return await call(self._thread, lambda engine: engine.configs)

    async def statistics(self) -> Statistics:
        return await call(self._thread, Engine.statistics)

    def close(self) -> None:
        """Do nothing: the thread ends with its process."""

    def _make(self) -> Engine:
        section = self._section
        device = torch.device("cuda" if section.scaling.gpus_per_engine else "cpu")
        dtype = arithmetic(section.dtype, device)
        model = load_base(section.path, dtype, section.attention, device)
        processor: Any = load_processor(section.path)
        exported = attach_as_exported(model, section.path)
        skip = section.skip or exported or SkipConfig.full()
        settings = section.engine.model_dump(include=set(EngineSection.model_fields))
        engine = Engine(model, processor, skip, **settings)
        self._grammars = Grammars(processor.tokenizer, engine.vocabulary, sorted(engine.ending))
        return engine


def _plan(engine: Engine, request: Request, until: float) -> TokenPlan:
    # The deadline may have passed while other plans and steps ran.
    if time.time() >= until:
        raise DeadlineError
    return engine.plan(request)
