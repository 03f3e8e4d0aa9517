"""vLLM as the engine of a job: one engine for many threads, whose requests share its batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from pipelines.engines.config import BackendSection
from pipelines.engines.model import EngineModel
from pipelines.engines.thread import Outcome
from pipelines.engines.vllm.awaited import AsyncVllm
from skipvision.engine import Request, Statistics

T = TypeVar("T")


class VllmEngine:
    """An `AsyncVllm` in an event loop of its own, for many threads.

    Args:
        model: as `settings.vllm_model` returned it.
        settings: of the engine.
        died: called in the event loop's thread when vLLM's processes have died, before waiting threads get
            the error.
    """

    def __init__(
        self, model: EngineModel, settings: BackendSection, died: Callable[[BaseException], None]
    ) -> None:
        self._engine = AsyncVllm(model, settings, died)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._ready = self._submit(self._engine.start())

    def wait_until_ready(self) -> None:
        """Wait until vLLM can answer.

        Raises:
            ConfigError: it refuses the settings.
            VllmError: its processes cannot start.
        """
        self._ready.result()

    def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run requests and wait until all have ended; results come in the order of the requests."""
        return [future.result() for future in [self._submit(self._engine.answer(one)) for one in requests]]

    def statistics(self) -> Statistics:
        """Return the counters since the engine started; what only vLLM's processes know is 0."""
        return self._engine.statistics()

    def stop(self) -> None:
        """End vLLM's processes and drop the running requests."""
        if self._ready.exception() is None:
            self._engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)
