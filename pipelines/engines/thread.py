"""One engine for many threads, whose requests share its batches.

The engine runs in a thread of its own. Other threads put calls into the thread's inbox, and the thread runs
them between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from skipvision.engine import Chunk, Completion, Engine, Request, Statistics
from skipvision.errors import SkipVisionError

T = TypeVar("T")

Outcome = Completion | SkipVisionError
"""The result of a request: its completion, or the error for which the engine refused it."""

Deliver = Callable[[Chunk | BaseException], None]
"""Receives a request's chunks in the engine's thread; an exception means that the engine itself failed."""

_Call = tuple[Callable[[Engine], Any], Future[Any]]

_IDLE_SECONDS = 1.0
"""Interval at which an idle engine renews `EngineThread.stepped`, its sign of life."""


class EngineThread:
    """A thread that runs one engine until `stop`.

    Args:
        make: builds the engine; called in the thread.
        failed: called in the thread with the engine's failure, before waiting threads get it.

    Attributes:
        stepped: time of the last step, or of the last check without work (`time.monotonic`).
    """

    def __init__(
        self, make: Callable[[], Engine], failed: Callable[[BaseException], None] | None = None
    ) -> None:
        self.stepped = time.monotonic()
        self._inbox: SimpleQueue[_Call | None] = SimpleQueue()
        self._listeners: dict[int, Deliver] = {}
        self._ready: Future[None] = Future()
        self._failed = failed
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(make,), name="engine", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Wait until the engine exists. Raise the error of ``make`` if it failed."""
        self._ready.result()

    @property
    def failure(self) -> BaseException | None:
        """The exception that ended the thread; None while it runs."""
        return self._failure

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run a function on the engine between two steps; the future gets its result, or its failure."""
        result: Future[T] = Future()
        with self._lock:
            if self._failure is not None:
                result.set_exception(self._failure)
            else:
                self._inbox.put((function, result))
        return result

    def submit(self, request: Request, deliver: Deliver) -> Future[int]:
        """Submit a request; the future holds its number, and its chunks go to ``deliver``."""

        def submit(engine: Engine) -> int:
            number = engine.submit(request)
            self._listeners[number] = deliver
            return number

        return self.call(submit)

    def cancel(self, number: int) -> None:
        """Cancel a request; none of its later chunks are delivered."""

        def forget(engine: Engine) -> None:
            self._listeners.pop(number, None)
            engine.cancel(number)

        self.call(forget)

    def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Run requests and wait until all have ended; results come in the order of the requests.

        A failure of the engine itself is raised in every thread that waits.
        """
        return [future.result() for future in [self._answer(request) for request in requests]]

    def statistics(self) -> Statistics:
        """Return the engine's counters since it started; waits for the current step."""
        return self.call(Engine.statistics).result()

    def stop(self) -> None:
        """End the thread and drop its running requests."""
        self._inbox.put(None)
        self._thread.join()

    def _answer(self, request: Request) -> Future[Outcome]:
        outcome: Future[Outcome] = Future()

        def deliver(item: Chunk | BaseException) -> None:
            if isinstance(item, BaseException):
                outcome.set_exception(item)
            elif item.completion is not None:
                outcome.set_result(item.completion)

        def submitted(number: Future[int]) -> None:
            error = number.exception()
            if isinstance(error, SkipVisionError):
                outcome.set_result(error)
            elif error is not None:
                outcome.set_exception(error)

        self.submit(request, deliver).add_done_callback(submitted)
        return outcome

    # --------------------------------------------------------------------------- run in the thread

    def _run(self, make: Callable[[], Engine]) -> None:
        try:
            engine = make()
        except BaseException as error:
            self._end(error)
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            with engine:
                self._work(engine)
            self._end(RuntimeError("the engine's thread was stopped"))
        except BaseException as error:  # every waiting thread must get it, whatever it is
            if self._failed is not None:
                self._failed(error)
            self._end(error)

    def _work(self, engine: Engine) -> None:
        while True:
            for call in self._calls(wait=not engine.busy):
                if call is None:
                    return
                _run_call(engine, *call)
            for chunk in engine.step() if engine.busy else ():
                ended = chunk.completion is not None
                deliver = self._listeners.pop(chunk.id, None) if ended else self._listeners.get(chunk.id)
                if deliver is not None:
                    deliver(chunk)
            self.stepped = time.monotonic()

    def _calls(self, *, wait: bool) -> Iterator[_Call | None]:
        with suppress(Empty):
            if wait:
                yield self._inbox.get(timeout=_IDLE_SECONDS)
            while True:
                yield self._inbox.get_nowait()

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
        for call in self._calls(wait=False):
            if call is not None and call[1].set_running_or_notify_cancel():
                call[1].set_exception(error)
        for deliver in self._listeners.values():
            deliver(error)


def _run_call(engine: Engine, function: Callable[[Engine], Any], result: Future[Any]) -> None:
    if not result.set_running_or_notify_cancel():
        return  # the caller has cancelled it
    try:
        result.set_result(function(engine))
    except BaseException as error:
        result.set_exception(error)
