"""An engine that many threads may ask at once: what one's requests leave free, another's fill.

The engine belongs to its thread: what others want is put in its inbox, and it is asked between two steps.
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
"""How a request ended; an error of ours is why it was refused before it began."""

Deliver = Callable[[Chunk | BaseException], None]
"""Takes a request's chunks, in the engine's thread; an exception is the end of the engine itself."""

_Question = tuple[Callable[[Engine], Any], Future[Any]]

_IDLE_SECONDS = 1.0
"""An engine without work is alive as well, and says so this often."""


class EngineThread:
    """Runs one engine until it is stopped.

    Args:
        make: makes the engine, in the thread.
        failed: called in the thread when the engine has failed, before those who wait hear of it.

    Attributes:
        stepped: when the engine last finished a step, or had nothing to do (`time.monotonic`).
    """

    def __init__(
        self, make: Callable[[], Engine], failed: Callable[[BaseException], None] | None = None
    ) -> None:
        self.stepped = time.monotonic()
        self._inbox: SimpleQueue[_Question | None] = SimpleQueue()
        self._listeners: dict[int, Deliver] = {}
        self._ready: Future[None] = Future()
        self._failed = failed
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, args=(make,), name="engine", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Return when the engine has been made; raises what went wrong with it."""
        self._ready.result()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread, if something did."""
        return self._failure

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """What a function says of the engine, between two steps; or what ended the engine."""
        answer: Future[T] = Future()
        with self._lock:
            if self._failure is not None:
                answer.set_exception(self._failure)
            else:
                self._inbox.put((function, answer))
        return answer

    def submit(self, request: Request, deliver: Deliver) -> Future[int]:
        """Its number, once the engine has taken it; its chunks are delivered from then on."""

        def submit(engine: Engine) -> int:
            number = engine.submit(request)
            self._listeners[number] = deliver
            return number

        return self.call(submit)

    def cancel(self, number: int) -> None:
        """Forget a request; nothing more of it is delivered."""

        def forget(engine: Engine) -> None:
            self._listeners.pop(number, None)
            engine.cancel(number)

        self.call(forget)

    def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Wait until all of them have ended.

        An error of the engine itself, not of one request, is raised in every thread that waits.
        """
        return [future.result() for future in [self._answer(request) for request in requests]]

    def statistics(self) -> Statistics:
        """Of the engine."""
        return self.call(Engine.statistics).result()

    def stop(self) -> None:
        """End the thread; what runs is dropped."""
        self._inbox.put(None)
        self._thread.join()

    def _answer(self, request: Request) -> Future[Outcome]:
        outcome: Future[Outcome] = Future()

        def deliver(item: Chunk | BaseException) -> None:
            if isinstance(item, BaseException):
                outcome.set_exception(item)
            elif item.completion is not None:
                outcome.set_result(item.completion)

        def taken(number: Future[int]) -> None:
            error = number.exception()
            if isinstance(error, SkipVisionError):
                outcome.set_result(error)
            elif error is not None:
                outcome.set_exception(error)

        self.submit(request, deliver).add_done_callback(taken)
        return outcome

    # ------------------------------------------------------------------------------- in the thread

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
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            if self._failed is not None:
                self._failed(error)
            self._end(error)

    def _work(self, engine: Engine) -> None:
        while True:
            for question in self._questions(wait=not engine.busy):
                if question is None:
                    return
                _ask(engine, *question)
            for chunk in engine.step() if engine.busy else ():
                over = chunk.completion is not None
                deliver = self._listeners.pop(chunk.id, None) if over else self._listeners.get(chunk.id)
                if deliver is not None:
                    deliver(chunk)
            self.stepped = time.monotonic()

    def _questions(self, *, wait: bool) -> Iterator[_Question | None]:
        with suppress(Empty):
            if wait:
                yield self._inbox.get(timeout=_IDLE_SECONDS)
            while True:
                yield self._inbox.get_nowait()

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._failure = error
        for question in self._questions(wait=False):
            if question is not None and question[1].set_running_or_notify_cancel():
                question[1].set_exception(error)
        for deliver in self._listeners.values():
            deliver(error)


def _ask(engine: Engine, function: Callable[[Engine], Any], answer: Future[Any]) -> None:
    if not answer.set_running_or_notify_cancel():
        return  # who asked has gone
    try:
        answer.set_result(function(engine))
    except BaseException as error:
        answer.set_exception(error)
