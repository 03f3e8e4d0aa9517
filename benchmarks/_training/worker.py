"""A process that trains in one way: ``python -m benchmarks._training.worker OPTIONS``, with options as JSON.

Each line of standard input is a job ``{"turn": 0, "count": false}``: train on all rows once. The answer is a
line of standard output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import skipvision as sv
from benchmarks import _measure
from benchmarks._training.ways import SFT, SFT_CHECKPOINTS, Setup, epoch_of

Job = dict[str, Any]


def main() -> None:
    """Build the model, and train until standard input ends."""
    options = json.loads(sys.argv[1])
    # Trainers print on standard output.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    transformers.utils.logging.set_verbosity_error()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    setup = Setup.of(options)
    idle = _resident()
    _send(channel, {"versions": _versions(options["way"])})
    for line in sys.stdin:
        _send(channel, {**_run(setup, json.loads(line)), "idle_bytes": idle})
    channel.flush()
    os._exit(0)


def _send(channel: Any, value: Job) -> None:
    channel.write(json.dumps(value) + "\n")
    channel.flush()


def _run(setup: Setup, job: Job) -> Job:
    """Train on all rows once; with ``count``, count the FLOPs, which takes time of its own."""
    epoch = epoch_of(setup.options["way"])
    setup.positions, watches = 0, []

    def once() -> None:
        watches.append(epoch(setup, job["turn"]))

    flops = sv.measure_flops(once) if job["count"] else 0
    if not watches:
        once()
    return {
        "seconds": watches[0].seconds,
        "cpu": watches[0].cpu,
        "flops": flops,
        "positions": setup.positions,
        "images": len(setup.rows),
    }


def _versions(way: str) -> str:
    if way in (SFT, SFT_CHECKPOINTS):
        import trl

        return f"trl {trl.__version__}, {_measure.versions()}"
    return _measure.versions()


def _resident() -> int:
    """Return the bytes of this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
