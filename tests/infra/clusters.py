"""Ray clusters of processes on this machine, and jobs that join them.

They keep their files in a folder of their own, so that they do not touch another Ray of the machine.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@contextmanager
def rays_folder() -> Iterator[Path]:
    """A folder for Rays that are started in the block, short enough for the paths of their sockets."""
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield Path(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    """Return whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < end:
        time.sleep(0.5)
    return bool(reached)


@dataclass
class Jobs:
    """Starts scripts of jobs/ that join the Ray at ``address``, with their files in ``folder``."""

    address: str
    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, job: str, settings: dict[str, Any], name: str | None = None) -> subprocess.Popen[str]:
        config = self.folder / f"{name or job}.json"
        config.write_text(json.dumps(settings))
        return self.run(f"jobs/{job}.py", "--config", str(config))

    def run(self, script: str, *options: str, **environment: str) -> subprocess.Popen[str]:
        """Start a script of the repository, in its root."""
        own = {"RAY_ADDRESS": self.address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        process = subprocess.Popen(
            [sys.executable, script, *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Kill the jobs that still run, after a test that failed."""
        for process in self.started:
            with process:
                process.kill()


def result(process: subprocess.Popen[str], watch: Callable[[str], object] = lambda _: None) -> Any:
    """Call ``watch`` with each line of a job, and return its result, which is the last line."""
    lines: list[str] = []
    with process:
        for line in process.stdout or ():
            lines.append(line)
            watch(line)
    assert process.returncode == 0, "".join(lines[-60:])
    return json.loads(lines[-1])
