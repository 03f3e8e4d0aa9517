"""vLLM as the engine of a replica, in the replica's own event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace

from pipelines.engines.vllm_async import AsyncVllm
from pipelines.engines.vllm_meter import UNMEASURED
from pipelines.engines.vllm_prompts import Rendered
from pipelines.engines.vllm_settings import VllmError, prunes_images
from serve.config import ModelSection
from serve.errors import DeadlineError, LengthError
from serve.replica.grammar import Grammars
from serve.replica.messages import Work
from serve.replica.vllm_adapters import VllmAdapters
from serve.replica.vllm_settings import engine_model, further_arguments
from skipvision import SkipConfig
from skipvision.engine import BASE, Chunk, Request, Statistics
from skipvision.errors import ConfigError, UnsupportedModelError
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
        self._model = engine_model(section)
        self._died = died
        self._engine = AsyncVllm(self._model, section.engine, self._end, further_arguments(section))
        self._prunes = prunes_images()
        self.stepped = time.monotonic()

    async def start(self) -> None:
        await self._engine.start()
        processor, loop = self._engine.processor, asyncio.get_running_loop()
        self._grammars = Grammars(processor.tokenizer, self._engine.vocabulary, [])
        self.adapters = VllmAdapters(self._engine, self._model.skip, loop)
        self._watching = loop.create_task(self._watch())

    async def stream(self, request: Request, work: Work, *, whole: bool) -> AsyncGenerator[Chunk, None]:
        until = time.monotonic() + (request.deadline or 0.0)
        if work.schema is not None:
            await asyncio.to_thread(self._grammars.check, work.schema)
        with self.adapters.using(request.adapter or BASE) as adapter:
            config = request.skip if isinstance(request.skip, SkipConfig) else adapter.skip
            try:
                async with asyncio.timeout_at(until):
                    rendered = await self._engine.render(request, self._setting(config))
            except TimeoutError as error:
                raise DeadlineError from error
            left = max(until - time.monotonic(), 1e-3)
            request = self._fitting(replace(request, deadline=left), rendered, work.least)
            chunks = self._engine.stream(
                request, rendered, config, lora=adapter.lora, schema=work.schema, whole=whole
            )
            async with aclosing(chunks):
                async for chunk in chunks:
                    self.stepped = time.monotonic()
                    if chunk.completion is not None or not whole:
                        yield chunk

    def _setting(self, config: SkipConfig) -> object:
        """Return the plug-in's setting of a request; None = the server's default."""
        if config == self._model.skip:
            return None
        if not self._prunes:
            raise ConfigError(
                "this server prunes no images: the plug-in for vLLM is not installed. Leave skip out"
            )
        return "full" if config == SkipConfig.full() else config.model_dump()

    def _fitting(self, request: Request, rendered: Rendered, least: int) -> Request:
        """Return the request with an answer that fits next to its prompt. Raise `LengthError`."""
        room, wanted = self._engine.max_positions - len(rendered), request.sampling.max_new_tokens
        if room < least:
            raise LengthError(
                f"the messages leave {max(room, 0)} of this model's positions, too few for an answer of "
                f"{least} tokens: shorten them"
            )
        sampling = request.sampling.model_copy(update={"max_new_tokens": min(wanted, room)})
        return replace(request, sampling=sampling)

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

    def _end(self, error: BaseException) -> None:
        self.adapters.close()
        self._engine.shutdown()
        self._died(error)

    def __del__(self) -> None:
        """End vLLM's processes. The replica is deleted before its process ends."""
        self._engine.shutdown()
