"""An engine that many threads may ask at once: what one thread's batch leaves free, another's fills."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue

from skipvision.engine import Completion, Engine, Request, Statistics
from skipvision.errors import SkipVisionError

Outcome = Completion | SkipVisionError
"""How a request ended; an error of ours is why it was refused before it began."""


class EngineThread:
    """Runs the engine in a thread of its own for as long as the process lives."""

    def __init__(self, engine: Engine) -> None:
        self.statistics: Statistics = engine.statistics()
        self._engine = engine
        self._inbox: SimpleQueue[tuple[Request, Future[Outcome]]] = SimpleQueue()
        self._running: dict[int, Future[Outcome]] = {}
        self._broken: BaseException | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._work, daemon=True, name="engine").start()

    def answer(self, requests: Sequence[Request]) -> list[Outcome]:
        """Wait until all of them have ended.

        An error of the engine itself, not of one request, is raised in every thread that waits.
        """
        waiting: list[Future[Outcome]] = [Future() for _ in requests]
        with self._lock:
            if self._broken is not None:
                raise self._broken
            for pair in zip(requests, waiting, strict=True):
                self._inbox.put(pair)
        return [future.result() for future in waiting]

    def _work(self) -> None:
        try:
            while True:
                self._take(wait=not self._engine.busy)
                for chunk in self._engine.step():
                    if chunk.completion is not None:
                        self.statistics = self._engine.statistics()
                        self._running.pop(chunk.id).set_result(chunk.completion)
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            self._break(error)

    def _take(self, *, wait: bool) -> None:
        """Hand over what has come in; wait for something if there is nothing to do."""
        with suppress(Empty):
            while True:
                request, future = self._inbox.get(block=wait)
                wait = False
                try:
                    self._running[self._engine.submit(request)] = future
                except SkipVisionError as error:
                    future.set_result(error)
                except BaseException as error:
                    future.set_exception(error)
                    raise

    def _break(self, error: BaseException) -> None:
        with self._lock:
            self._broken = error
            with suppress(Empty):
                while True:
                    _, future = self._inbox.get_nowait()
                    future.set_exception(error)
        for future in self._running.values():
            future.set_exception(error)
