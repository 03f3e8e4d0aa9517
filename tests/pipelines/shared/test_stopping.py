"""A job that gets a signal cleans up, and its exit status names the signal."""

from __future__ import annotations

import os
import signal

import pytest

from pipelines.shared.config import run_job
from pipelines.shared.stopping import SIGNALS, handlers_kept


@pytest.fixture
def unignored():
    """Signals with their default handlers: in the background of a script, tests ignore some of them."""
    ignored = [one for one in SIGNALS if signal.getsignal(one) == signal.SIG_IGN]
    for one in ignored:
        signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
    yield
    for one in ignored:
        signal.signal(one, signal.SIG_IGN)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("unignored")
def test_a_job_cleans_up_without_being_disturbed_by_further_signals(number, capfd):
    before = {one: signal.getsignal(one) for one in SIGNALS}
    cleaned = []

    def main(argv: list[str]) -> dict[str, object]:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)
        return {}

    with pytest.raises(SystemExit) as stopped:
        run_job(main, [])
    assert stopped.value.code == 128 + number
    assert cleaned
    assert f"{number.name}: stopping" in capfd.readouterr().err
    assert {one: signal.getsignal(one) for one in SIGNALS} == before


def test_an_ignored_signal_stays_ignored():
    """SIGHUP under nohup, for example."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_job(lambda _: os.kill(os.getpid(), signal.SIGHUP) or {"ran": True}, [])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_that_a_library_replaces_are_restored():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        with handlers_kept():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
