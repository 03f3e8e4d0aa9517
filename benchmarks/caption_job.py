"""Compare the captioning job under Ray Data with the bare engine, on the same rows.

    python -m benchmarks run caption_job --out docs/benchmarks/engine.md --part caption-job

Each way runs in its own process with one torch thread, in turn. The rate of the job is the one that it
reports, from its first caption on; it reads and prepares images in parallel with its engine. The bare engine
runs once with prepared rows, and once reads and prepares them itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _measure
from benchmarks._measure import Spread
from benchmarks._run import Run

ROOT = Path(__file__).parents[1]
PROMPT = "Describe the image."
TOKENS = 96


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update the page."""
    options = _options().parse_args(arguments)
    if options.bare:
        print(json.dumps(_bare(options, ready=options.bare == "ready")))
        return
    run = Run("caption_job", arguments)
    rates: dict[str, list[float]] = {"ready": [], "alone": [], "job": []}
    for _ in range(options.repeats):
        rates["ready"].append(_in_process(options, "ready"))
        rates["alone"].append(_in_process(options, "alone"))
        rates["job"].append(_job(options))
        print({name: f"{values[-1]:.2f}" for name, values in rates.items()}, file=sys.stderr, flush=True)
    names = {
        "ready": "bare engine, rows ready-made",
        "alone": "bare engine, reading and preparing itself",
        "job": "`jobs/caption.py`",
    }
    rows = [
        [
            names[name],
            Spread.of(values).text(digits=1),
            Spread.of([a / b for a, b in zip(values, rates["ready"], strict=True)]).text(digits=2),
        ]
        for name, values in rates.items()
    ]
    conditions = f"{options.rows} images, {options.sequences} sequences, one torch thread"
    text = run.text(conditions, _measure.table(["way", "rows/s", "÷ ready-made"], rows))
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


def _in_process(options: argparse.Namespace, way: str) -> float:
    words = [sys.executable, "-m", "benchmarks.caption_job", "--bare", way, *_shared(options)]
    return float(json.loads(_last_line(words)))


def _job(options: argparse.Namespace) -> float:
    """Return the rate that the job reports: rows per second once its engines run."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "jobs/caption.py", "--name", "benchmark", "--storage", folder]
        words += ["--model.path", str(options.model), "--model.dtype", "float32"]
        words += ["--input.source", str(options.images), "--input.limit", str(options.rows)]
        words += ["--input.prompt", PROMPT, "--sampling.max_new_tokens", str(TOKENS)]
        words += ["--engine.max_sequences", str(options.sequences), "--scaling.cpus_per_worker", "1"]
        words += ["--skip", "{retained: 64, skipped: 64}"]
        result: dict[str, Any] = json.loads(_last_line(words))
    return float(result["rows_per_second"])


def _last_line(words: Sequence[str]) -> str:
    # Linux shares cores among sessions. Ray's processes have their own, so this one gets its own as well.
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        start_new_session=True,
    )
    return done.stdout.strip().splitlines()[-1]


def _bare(options: argparse.Namespace, ready: bool) -> float:
    """Measure rows per second of `Engine.run`."""
    from PIL import Image

    from skipvision import Engine, Request, Sampling, SkipConfig
    from skipvision.engine import prepare
    from skipvision.loading import load_model, load_processor

    torch.set_num_threads(1)
    model = load_model(options.model, dtype=torch.float32)
    processor: Any = load_processor(options.model)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    sampling = Sampling(max_new_tokens=TOKENS)

    def requests(count: int) -> Any:
        for file in sorted(options.images.iterdir())[:count]:
            with Image.open(file) as image:
                yield prepare(processor, Request(chat, [image.convert("RGB")], sampling=sampling))

    config = SkipConfig(retained=64, skipped=64)
    with Engine(model, processor, config, max_sequences=options.sequences) as engine:
        list(engine.run(requests(8)))
        rows = list(requests(options.rows)) if ready else requests(options.rows)
        begin = time.perf_counter()
        answered = sum(completion.error is None for completion in engine.run(rows))
        seconds = time.perf_counter() - begin
    return answered / seconds


def _shared(options: argparse.Namespace) -> list[str]:
    words = ["--rows", options.rows, "--sequences", options.sequences, "--model", options.model]
    return [str(word) for word in [*words, "--images", options.images]]


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("caption_job", __doc__)
    add = parser.add_argument
    add("--rows", type=int, default=400, help="images (default: %(default)s)")
    add("--sequences", type=int, default=16, help="captions generated at once (default: %(default)s)")
    add("--model", type=Path, default=ROOT / "models/shapes-llava", help="base model (default: %(default)s)")
    images = ROOT / "data/shapes/images/train"
    add("--images", type=Path, default=images, help="folder of images (default: %(default)s)")
    add("--repeats", type=int, default=2, help="runs of each way (default: %(default)s)")
    add("--bare", choices=["ready", "alone"], help="run only this way, in this process, and print its rate")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="caption-job", help="name of the page's part (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
