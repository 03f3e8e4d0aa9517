"""vLLM at full size for `benchmarks.gpu`: full tokens without the plug-in against pruned ones with it.

vLLM creates the random weights on the device, so the folder has a config and no weights. Both settings are
loaded at once and take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import _measure
from benchmarks._engines.processes import Worker
from benchmarks._engines.rounds import measure_rounds
from benchmarks._engines.workload import WORDS, write_images, write_processor
from benchmarks._measure import FULL, Geometry

Record = dict[str, Any]
_LONGEST = 160
"""Tokens of the longest answer of `answer_lengths`."""


def measure_vllm(options: argparse.Namespace, geometry: Geometry) -> Iterator[Record]:
    """Measure vLLM with each setting at each concurrency."""
    names = [FULL, *(options.settings or ["100+0"])]
    with tempfile.TemporaryDirectory(prefix="vllm-") as name, ExitStack() as stack:
        folder = Path(name)
        _write_model(folder, geometry)
        workers = {
            ("vllm", setting): stack.enter_context(
                Worker(
                    sys.executable,
                    _options(options, folder, geometry, setting, len(names)),
                    folder / f"{setting}.log",
                )
            )
            for setting in names
        }
        run = {
            "command": " ".join(["python", "-m", "benchmarks", "run", "gpu", *sys.argv[1:]]),
            "date": _measure.today(),
            "machine": f"{_device(options)}; {_name(options)}, {options.dtype}, "
            f"{(geometry.image // geometry.patch) ** 2} visual tokens, {WORDS} words",
            "threads": 0,
        }
        for record in measure_rounds(
            workers,
            folder,
            concurrency=options.concurrency,
            requests=lambda clients: max(options.requests, 2 * clients),
            repeats=options.repeats,
            seed=0,
        ):
            yield {**run, "load": os.getloadavg()[0], **record}


def _write_model(folder: Path, geometry: Geometry) -> None:
    config = geometry.config()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder / "model")
    write_processor(folder / "model", geometry)
    write_images(folder, geometry, 64)


def _options(
    options: argparse.Namespace, folder: Path, geometry: Geometry, setting: str, engines: int
) -> Record:
    config = _measure.setting(setting)
    return {
        "engine": "vllm",
        "model": str(folder / "model"),
        "skip": None if config is None else config.model_dump(),
        "dtype": options.dtype,
        "threads": 0,
        "max_sequences": max(options.concurrency),
        "max_model_len": (geometry.image // geometry.patch) ** 2 + WORDS + _LONGEST,
        "kv_gib": 1.0,
        "eager": options.tiny,
        "random_weights": True,
        # Engines share one device.
        "gpu_memory_utilization": None if options.device == "cpu" else 0.9 / engines,
    }


def _device(options: argparse.Namespace) -> str:
    if options.device == "cpu":
        return _measure.processor()
    import torch

    return torch.cuda.get_device_name()


def _name(options: argparse.Namespace) -> str:
    return "tiny" if options.tiny else str(options.geometry)
