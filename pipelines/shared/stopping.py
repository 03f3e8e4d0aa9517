"""Turn SIGTERM, SIGHUP and Ctrl-C into one exception, so that a stopped job cleans up."""

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
    """The signal that ended a block."""

    signal: signal.Signals = signal.SIGINT

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as in shells."""
        return 128 + self.signal


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Raise `KeyboardInterrupt` at the first signal in the block; ignore later ones while the job cleans up.

    A signal that was ignored before, such as SIGHUP under ``nohup``, stays ignored. Outside of the main
    thread, which alone receives signals in Python, this does nothing.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}
    handled = [one for one, handler in before.items() if handler not in (signal.SIG_IGN, None)]

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        for one in handled:
            signal.signal(one, _ignore)
        stop.signal = signal.Signals(number)
        # Not print, which may be the call that was interrupted.
        os.write(2, f"\n{stop.signal.name}: stopping and cleaning up …\n".encode())
        raise KeyboardInterrupt

    for one in handled:
        signal.signal(one, handle)
    try:
        yield stop
    finally:
        for one in handled:
            signal.signal(one, before[one])


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the handlers that the block replaces. Ray's print a C++ stack and end the process at once."""
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


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. Child processes would inherit SIG_IGN."""
