"""Call an engine that runs in a thread from asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from pipelines.engines.thread import EngineThread
from skipvision.engine import Chunk, Engine, Request

T = TypeVar("T")


async def call(thread: EngineThread, function: Callable[[Engine], T]) -> T:
    """Run a function of the engine between two of its steps, and return its result."""
    return await asyncio.wrap_future(thread.call(function))


async def stream(
    thread: EngineThread, request: Request, *, whole: bool = False
) -> AsyncGenerator[Chunk, None]:
    """Yield the chunks of one request. Leaving the iteration, or cancellation, cancels the request at once.

    Args:
        thread: thread of the engine.
        request: tokenized, with processed images.
        whole: yield only the last chunk, which has the completion. Each other chunk would wake this event
            loop, and the engine would wait for the interpreter meanwhile.

    Raises:
        SkipVisionError: the engine refuses the request.
    """
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()

    def deliver(item: Chunk | BaseException) -> None:
        if whole and isinstance(item, Chunk) and item.completion is None:
            return
        # The loop may be closed by the time the client has disconnected.
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
