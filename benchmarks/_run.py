"""The frame of a benchmark: its options, its command, and the machine and versions that it runs on."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks._record import today


class Run:
    """One run of a benchmark, from here on.

    Args:
        name: of the benchmark.
        arguments: of its command line; None = those of this process.

    Attributes:
        command: that repeats it.
        load: load average before it.
    """

    def __init__(self, name: str, arguments: Sequence[str] | None) -> None:
        words = sys.argv[1:] if arguments is None else arguments
        self.command = shlex.join(["python", "-m", "benchmarks", "run", name, *words])
        self.load = os.getloadavg()[0]

    def text(self, conditions: str, *sections: str) -> str:
        """Format the part of a page that has these sections; see `_record`.

        Args:
            conditions: settings of the run, divided by semicolons; may be empty.
            sections: Markdown.
        """
        loads = f"load average {self.load:.1f} before, {os.getloadavg()[0]:.1f} after."
        named = [today(), processor(), versions(), *([conditions] if conditions else []), loads]
        return "\n\n".join([f"`{self.command}`", "; ".join(named), *sections])


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for the options of a benchmark."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks run {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def versions() -> str:
    """Describe the versions of Python and the main libraries."""
    names = ("torch", "transformers", "peft")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def processor() -> str:
    """Describe the CPU, its visible cores and torch's threads."""
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def native_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_info("flags").split())


def _cpu_info(name: str) -> str:
    """Return a field of /proc/cpuinfo for the first core; empty on other systems."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
