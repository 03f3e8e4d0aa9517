"""asyncio's way to an engine that runs in a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from pipelines.engines.thread import EngineThread
from skipvision.engine import Chunk, Engine, Request

T = TypeVar("T")


async def ask(thread: EngineThread, function: Callable[[Engine], T]) -> T:
    """What a function says of the engine, between two steps."""
    return await asyncio.wrap_future(thread.call(function))


async def stream(thread: EngineThread, request: Request, *, whole: bool = False) -> AsyncIterator[Chunk]:
    """The chunks of one request. Leaving the iteration, or being cancelled, cancels the request at once.

    Args:
        thread: the engine's.
        request: prepared.
        whole: give only the last chunk, which completes it: every other one would wake this loop, for which
            the engine waits.

    Raises:
        SkipVisionError: the engine refuses it.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()

    def deliver(item: Chunk | BaseException) -> None:
        if whole and isinstance(item, Chunk) and item.completion is None:
            return
        # The loop may be gone when the client's connection is.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(chunks.put_nowait, item)

    def cancel(taken: Future[int]) -> None:
        if not taken.cancelled() and taken.exception() is None:
            thread.cancel(taken.result())

    taken = thread.submit(request, deliver)
    over = False
    try:
        await asyncio.wrap_future(taken)
        while not over:
            item = await chunks.get()
            over = isinstance(item, BaseException) or item.completion is not None
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        if not over:
            taken.add_done_callback(cancel)
