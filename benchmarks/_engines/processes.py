"""Start engines in processes of their own, and measure what these processes use."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self, cast

ROOT = Path(__file__).parents[2]
_TICKS = os.sysconf("SC_CLK_TCK")
_SESSION, _USER, _SYSTEM = 3, 11, 12
"""Fields of /proc/PID/stat after the name of the program."""


class Worker:
    """A process that runs one engine with one setting, and the processes that it starts.

    Args:
        python: of the environment in which the engine is installed.
        options: of the module.
        log: takes what the engine prints.
        module: the program of the process.

    Attributes:
        versions: description of the environment.
    """

    def __init__(
        self, python: str, options: Mapping[str, Any], log: Path, module: str = "benchmarks._engines.worker"
    ) -> None:
        self._log = log
        threads = {"OMP_NUM_THREADS": str(options["threads"])} if options["threads"] else {}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module, json.dumps(options)],
                cwd=ROOT, env={**os.environ, **threads}, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self._jobs = cast("IO[str]", self._process.stdin)
        self._answers = cast("IO[str]", self._process.stdout)
        self.versions: str = self._read()["versions"]

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job; its result also has the CPU seconds and the peak memory of all processes."""
        before = self._cpu_seconds()
        self._reset_peak()
        self._jobs.write(json.dumps(job) + "\n")
        self._jobs.flush()
        result = self._read()
        return {**result, "cpu_seconds": self._cpu_seconds() - before, "peak_bytes": self._peak_bytes()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, 15)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            for pid in self._pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
        self._process.wait()
        self._jobs.close()
        self._answers.close()

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"an engine's process ended:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)

    # ---------------------------------------------------------------------------- from /proc

    def _pids(self) -> list[int]:
        """Return the processes of the worker's session."""
        return [pid for pid, fields in _processes() if int(fields[_SESSION]) == self._process.pid]

    def _cpu_seconds(self) -> float:
        own = [fields for _, fields in _processes() if int(fields[_SESSION]) == self._process.pid]
        return sum(int(fields[_USER]) + int(fields[_SYSTEM]) for fields in own) / _TICKS

    def _reset_peak(self) -> None:
        for pid in self._pids():
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _peak_bytes(self) -> int:
        """Return the sum of the processes' own peaks of resident memory."""
        total = 0
        for pid in self._pids():
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                total += next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
        return 1024 * total


def _processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            yield int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()
