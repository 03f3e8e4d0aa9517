"""Being told to stop: SIGTERM, SIGHUP and Ctrl-C all become one exception, so that a job cleans up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """Which signal ended the block, and the exit status that says so to a shell."""

    signal: signal.Signals = signal.SIGINT

    @property
    def exit_status(self) -> int:
        return 128 + self.signal


@contextmanager
def stoppable() -> Iterator[Stop]:
    """In the block, the first of the signals is a `KeyboardInterrupt`; later ones do not disturb cleaning up.

    A signal that is ignored, as SIGHUP is under ``nohup``, stays so. Outside of the main thread, where
    Python knows no signals, this does nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}
    heeded = [one for one, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def heed(number: int, frame: FrameType | None) -> None:
        del frame
        for one in heeded:
            signal.signal(one, _disregard)
        stop.signal = signal.Signals(number)
        # Not print: it may be what was interrupted.
        os.write(2, f"\n{stop.signal.name}: stopping and cleaning up …\n".encode())
        raise KeyboardInterrupt

    for one in heeded:
        signal.signal(one, heed)
    try:
        yield stop
    finally:
        for one in heeded:
            signal.signal(one, before[one])


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put handlers back that the block replaced: Ray's print a C++ stack and end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}
    try:
        yield
    finally:
        for one, handler in before.items():
            if callable(handler):
                signal.signal(one, handler)


def _disregard(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which child processes would inherit."""
