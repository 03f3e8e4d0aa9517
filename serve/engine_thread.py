"""An engine in a thread of its own, and asyncio's way to it.

The engine belongs to its thread: what others want is put in its inbox, and it is asked between two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from skipvision.engine import Chunk, Engine, Request, Statistics

T = TypeVar("T")
_Deliver = Callable[[Chunk | BaseException], None]


class EngineThread:
    """Runs one engine until it is stopped.

    Args:
        make: makes the engine, in the thread.

    Attributes:
        stepped: when the engine last finished a step, or had nothing to do (`time.monotonic`).
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._inbox: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, _Deliver] = {}
        self._ready: Future[None] = Future()
        self._failure: BaseException | None = None
        self.stepped = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(make,), name="engine", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Return when the engine has been made; raises what went wrong with it."""
        self._ready.result()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread, if something did."""
        return self._failure

    async def stream(self, request: Request) -> AsyncIterator[Chunk]:
        """The chunks of one request. Leaving the iteration, or being cancelled, cancels the request at once.

        Raises:
            SkipVisionError: the engine refuses it.
        """
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()

        def deliver(item: Chunk | BaseException) -> None:
            # The loop may be gone when the client's connection is.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(chunks.put_nowait, item)

        def submit(engine: Engine) -> int:
            number = engine.submit(request)
            self._listeners[number] = deliver
            return number

        number = await self.call(submit)
        over = False
        try:
            while not over:
                item = await chunks.get()
                if isinstance(item, BaseException):
                    over = True
                    raise item
                over = item.completion is not None
                yield item
        finally:
            if not over:
                self._put(lambda engine: self._forget(engine, number))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What a function says of the engine, between two steps."""
        answer: Future[T] = Future()

        def ask(engine: Engine) -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(function(engine))
            except BaseException as error:
                answer.set_exception(error)

        self._put(ask)
        return await asyncio.wrap_future(answer)

    async def statistics(self) -> Statistics:
        """Of the engine."""
        return await self.call(lambda engine: engine.statistics())

    def stop(self) -> None:
        """End the thread; what runs is dropped."""
        self._inbox.put(None)
        self._thread.join()

    def _put(self, message: Callable[[Engine], None]) -> None:
        if self._failure is not None:
            raise RuntimeError("the engine's thread has ended") from self._failure
        self._inbox.put(message)

    def _forget(self, engine: Engine, number: int) -> None:
        self._listeners.pop(number, None)
        engine.cancel(number)

    def _run(self, make: Callable[[], Engine]) -> None:
        try:
            engine = make()
        except BaseException as error:
            self._failure = error
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            self._serve(engine)
        except BaseException as error:
            self._failure = error
            for deliver in self._listeners.values():
                deliver(error)
            raise
        finally:
            engine.close()

    def _serve(self, engine: Engine) -> None:
        while True:
            for message in self._messages(wait=not engine.busy):
                if message is None:
                    return
                message(engine)
            for chunk in engine.step() if engine.busy else ():
                deliver = self._listeners.get(chunk.id)
                if deliver is not None:
                    deliver(chunk)
                    if chunk.completion is not None:
                        del self._listeners[chunk.id]
            self.stepped = time.monotonic()

    def _messages(self, wait: bool) -> list[Any]:
        found = []
        with contextlib.suppress(queue.Empty):
            if wait:
                # Not for ever: an idle engine is alive as well, and says so.
                found.append(self._inbox.get(timeout=1.0))
            while True:
                found.append(self._inbox.get_nowait())
        return found
