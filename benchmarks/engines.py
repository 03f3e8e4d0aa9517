"""This project's engine, vLLM with the plug-in, and OpenVINO GenAI: full tokens against pruned ones.

    python -m benchmarks run engines --engines native vllm openvino --python vllm=.venv-vllm/bin/python \
        --python openvino=PYTHON --out docs/benchmarks/engines.md

All engines get the same random weights, prompts and images, and take turns. Each runs in its own process, by
the Python of its environment. OpenVINO needs one with optimum-intel, openvino-genai and openvino-tokenizers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import _measure
from benchmarks._engines.processes import ROOT, Worker
from benchmarks._engines.report import report
from benchmarks._engines.rounds import measure_rounds
from benchmarks._engines.workload import WORDS, prompt, write_workload
from benchmarks._measure import FULL, Geometry

ENGINES = ["native", "vllm", "openvino"]

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update the page."""
    options = _options().parse_args(arguments)
    records = [] if options.report is None else _read(options.report)
    if not records:
        with tempfile.TemporaryDirectory(prefix="engines-") as name:
            folder = _prepare(options, options.folder or Path(name))
            measure = {"engines": _engines, "plugin": _plugin}
            for part in options.parts:
                for record in measure[part](options, folder):
                    records.append({"command": _command(arguments), **_run(options), **record})
                    print(json.dumps(records[-1]), file=sys.stderr, flush=True)
                    if options.json:
                        with options.json.open("a") as file:
                            file.write(json.dumps(records[-1]) + "\n")
    text = report(records)
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


def _read(files: Sequence[Path]) -> list[Record]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]


def _command(arguments: Sequence[str] | None) -> str:
    """Return the command without folders of this machine."""
    words = ["python", "-m", "benchmarks", "run", "engines", *(arguments or sys.argv[1:])]
    words = [f"{word.split('=')[0]}=PYTHON" if "=" in word else word for word in words]
    for option in ("--folder", "--json", "--out", "--part"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    return " ".join(words)


def _run(options: argparse.Namespace) -> Record:
    """Return what the records of a run share, and the load now."""
    geometry = f"hidden {options.hidden}, {options.layers} layers, {_visual(options)} visual tokens"
    return {
        "date": _measure.today(),
        "machine": f"{_measure.processor()}; {options.dtype}, {geometry}, {WORDS} words",
        "threads": options.threads,
        "load": os.getloadavg()[0],
    }


def _prepare(options: argparse.Namespace, folder: Path) -> Path:
    """Write the folder that all engines read, unless an earlier run did."""
    most = max([options.requests, *options.concurrency])
    if not (folder / "images").exists():
        write_workload(folder, _geometry(options), getattr(torch, options.dtype), _config(options), most)
    wanted = "openvino" in options.engines and "engines" in options.parts
    if wanted and not (folder / "openvino").exists():
        export = Path(_python(options, "openvino")).with_name("optimum-cli")
        subprocess.run(
            [export, "export", "openvino", "--model", folder / "model", "--task", "image-text-to-text",
             "--weight-format", "fp16", folder / "openvino"],
            check=True, stdout=sys.stderr,
        )  # fmt: skip
    return folder


# ------------------------------------------------------------------------------------------ engines


def _engines(options: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """Let all engines answer the same requests in turn."""
    settings = {name: [FULL] if name == "openvino" else [FULL, options.setting] for name in options.engines}
    pairs = [(name, setting) for name, own in settings.items() for setting in own]
    with ExitStack() as stack:
        workers = {
            pair: stack.enter_context(_worker(options, folder, *pair, folder / f"{'-'.join(pair)}.log"))
            for pair in pairs
        }
        yield from measure_rounds(
            workers,
            folder,
            concurrency=options.concurrency,
            requests=lambda clients: max(options.requests, clients),
            repeats=options.repeats,
            seed=options.seed,
        )


def _worker(options: argparse.Namespace, folder: Path, name: str, setting: str, log: Path) -> Worker:
    return Worker(_python(options, name), worker_options(options, folder, name, setting), log)


def worker_options(options: argparse.Namespace, folder: Path, name: str, setting: str) -> Record:
    """Return the options of one engine's process."""
    return {
        "engine": name,
        "model": str(folder / "model"),
        "openvino_model": str(folder / "openvino"),
        "skip": None if setting == FULL else _config(options).model_dump(),
        "dtype": options.dtype,
        "device": "cpu",
        "threads": options.threads,
        "max_sequences": max(options.concurrency),
        "max_model_len": 1024,
        "kv_gib": options.kv_gib,
        "eager": options.eager,
        "random_weights": False,
    }


# ------------------------------------------------------------------------------------------- plugin


def _plugin(options: argparse.Namespace, folder: Path) -> Iterator[Record]:
    """Measure the plug-in's own time in vLLM's worker."""
    given = worker_options(options, folder, "vllm", options.setting)
    given |= {"images": options.plugin_images, "repeats": options.plugin_repeats, "folder": str(folder)}
    given["prompts"] = [prompt(number) for number in range(max(options.plugin_images))]
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    done = subprocess.run(
        [_python(options, "vllm"), "-m", "benchmarks._engines.plugin_time", json.dumps(given)],
        cwd=ROOT, env={**os.environ, **threads}, stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    for record in json.loads(done.stdout.splitlines()[-1]):
        yield {"part": "plugin", "setting": options.setting, **record}


# ------------------------------------------------------------------------------------------- common


def _geometry(options: argparse.Namespace) -> Geometry:
    tower, layers = (256, 4) if options.hidden >= 512 else (64, 2)
    return Geometry.scaled(
        options.hidden, options.layers, tower=tower, tower_layers=layers, image=options.image
    )


def _config(options: argparse.Namespace) -> Any:
    return _measure.setting(options.setting)


def _visual(options: argparse.Namespace) -> int:
    geometry = _geometry(options)
    return (geometry.image // geometry.patch) ** 2


def _python(options: argparse.Namespace, engine: str) -> str:
    pythons = dict(entry.split("=", 1) for entry in options.python)
    return str(pythons.get(engine, sys.executable))


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("engines", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["engines", "plugin"], default=["engines"])
    add("--engines", nargs="+", choices=ENGINES, default=["native"])
    add("--python", action="append", default=[], metavar="ENGINE=PYTHON", help="default: this Python")
    add("--setting", default="100+0", help="RETAINED+0 (default: %(default)s)")
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    add("--requests", type=int, default=24, help="requests of a run, or as many as run at once, if more")
    add("--repeats", type=int, default=3, help="rounds over all engines and settings (default: %(default)s)")
    add("--plugin-images", type=int, nargs="+", default=[1, 8], help="images prefilled at once")
    add("--plugin-repeats", type=int, default=20, help="prefills of the plugin part")
    add("--hidden", type=int, default=1024, help="width of the decoder (default: %(default)s)")
    add("--layers", type=int, default=8, help="layers of the decoder (default: %(default)s)")
    add("--image", type=int, default=336, help="side of an image in pixels (default: %(default)s)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--kv-gib", type=float, default=1.0, help="memory for keys and values (default: %(default)s)")
    add("--eager", action="store_true", help="vLLM does not compile the model")
    add("--threads", type=int, default=0, help="threads of each engine; 0 = its own choice")
    add("--seed", type=int, default=0, help="seed of the answers' lengths (default: %(default)s)")
    add("--folder", type=Path, help="keep model and images in this folder, and use those of an earlier run")
    add("--json", type=Path, help="file to append the records to, one JSON line each")
    add("--report", type=Path, nargs="+", metavar="FILE", help="report on such files instead of measuring")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="engines", help="name of the page's part (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
