"""vLLM as the engine of a replica, in the replica's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace

from pipelines.engines.loading import load_config
from pipelines.engines.vllm.awaited import AsyncVllm
from pipelines.engines.vllm.meter import UNMEASURED
from pipelines.engines.vllm.pruning import pruning_problem
from pipelines.engines.vllm.settings import VllmError
from serve.config import ModelSection
from serve.errors import DeadlineError, LengthError
from serve.replica.grammar import Grammars
from serve.replica.messages import Work
from serve.replica.vllm.adapters import VllmAdapters
from serve.replica.vllm.settings import engine_model, further_arguments
from skipvision import SkipConfig
from skipvision.engine import BASE, Chunk, Request, Statistics
from skipvision.errors import ConfigError, UnsupportedModelError
from skipvision.integrations.vllm.equal_cost import without_skipped
from skipvision.integrations.vllm.settings import MAP_SKIPPED
from skipvision.plan import TokenPlan

_PING_SECONDS = 1.0
"""Time between queries whether vLLM's engine still takes steps (s)."""


class VllmReplicaEngine:
    """An `AsyncVllm` with adapters; see `ReplicaEngine`.

    Args:
        section: settings of the model and its engines.
        died: ends this process; called once vLLM's own processes have died, after ending those that have not.
    """

    unmeasured = UNMEASURED
    adapters: VllmAdapters

    def __init__(self, section: ModelSection, died: Callable[[BaseException], None]) -> None:
        self._section, self._model = section, engine_model(section)
        self._died = died
        self._engine = AsyncVllm(self._model, section.engine, self._end, further_arguments(section))
        self._unpruned = pruning_problem()
        self.stepped = time.monotonic()

    async def start(self) -> None:
        await self._engine.start()
        processor, loop = self._engine.processor, asyncio.get_running_loop()
        self._grammars = Grammars(processor.tokenizer, self._engine.vocabulary, [])
        self.adapters = VllmAdapters(self._engine, self._section, self._model.skip, loop)
        self._watching = loop.create_task(self._watch())

    async def stream(self, request: Request, work: Work, *, whole: bool) -> AsyncGenerator[Chunk, None]:
        until = time.monotonic() + (request.deadline or 0.0)
        if work.schema is not None:
            await asyncio.to_thread(self._grammars.check, work.schema)
        with self.adapters.using(request.adapter or BASE) as adapter:
            config = request.skip if isinstance(request.skip, SkipConfig) else adapter.skip
            try:
                async with asyncio.timeout_at(until):
                    config = await self._runnable(config)
                    rendered = await self._engine.render(request, self._setting(config))
            except TimeoutError as error:
                raise DeadlineError from error
            left = max(until - time.monotonic(), 1e-3)
            room = max(self._engine.room(rendered, config), 0)
            if room < work.least:
                raise LengthError(
                    f"the messages leave {room} of this model's positions, too few for an answer of "
                    f"{work.least} tokens: shorten them"
                )
            chunks = self._engine.stream(
                replace(request, deadline=left),
                rendered,
                config,
                lora=adapter.lora,
                schema=work.schema,
                whole=whole,
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    self.stepped = time.monotonic()
                    if chunk.completion is not None or not whole:
                        yield chunk

    async def _runnable(self, config: SkipConfig) -> SkipConfig:
        """Return the SkipConfig that vLLM runs for a request's. Raise `ConfigError` if there is none."""
        if config.is_full or config == self._model.skip:
            return config
        if self._unpruned is not None:
            raise ConfigError(f"this server prunes no images ({self._unpruned}). Leave skip out")
        if not config.skipped:
            return config
        # The first call measures the model, which takes seconds.
        equal = await asyncio.to_thread(without_skipped, config, load_config(self._model.base))
        if equal is not None and self._section.engine.engine_kwargs.get(MAP_SKIPPED):
            return equal
        instead = "skipped=0" if equal is None else f"retained={equal.retained}, skipped=0 for the same FLOPs"
        raise ConfigError(
            f"skipped={config.skipped!r}: in vLLM every token takes the whole decoder, so none bypasses the "
            f"feed-forward networks: use {instead}"
        )

    def _setting(self, config: SkipConfig) -> object:
        """Return the plug-in's setting of a request; None = the server's default."""
        default = self._model.skip
        if config == default or (config.is_full and default.is_full):
            return None
        return "full" if config.is_full else config.model_dump()

    async def plan(self, request: Request, until: float) -> TokenPlan:
        raise UnsupportedModelError(
            "vLLM does not report which patches it keeps: overlays need engine.backend native"
        )

    async def configs(self) -> Mapping[str, SkipConfig]:
        return self.adapters.configs

    async def statistics(self) -> Statistics:
        return self._engine.statistics()

    async def _watch(self) -> None:
        """Query vLLM's engine, which replies between two steps, so that a dead or hanging one is noticed."""
        with suppress(VllmError):
            while True:
                await self._engine.ping()
                self.stepped = time.monotonic()
                await asyncio.sleep(_PING_SECONDS)

    def close(self) -> None:
        """End vLLM's processes, and remove the files of adapters."""
        self.adapters.close()
        self._engine.shutdown()

    def _end(self, error: BaseException) -> None:
        self.close()
        self._died(error)
