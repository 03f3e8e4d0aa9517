"""LoRA fine-tuning by transformers' `Trainer`, TRL's `SFTTrainer` and this project, also with skipping.

    python -m benchmarks run training --trl .venv-trl/bin/python --out docs/benchmarks/training.md

All ways train the same random weights on the same rows, and take turns. Each runs in its own process. TRL
needs a Python with trl and datasets besides this project's requirements; without ``--trl`` it is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import skipvision as sv
from benchmarks import _measure
from benchmarks._engines.processes import Worker
from benchmarks._measure import FULL, Geometry, Spread
from benchmarks._run import Run
from benchmarks._training import padding, report
from benchmarks._training.attention import attention_table
from benchmarks._training.rows import Length, sample, write_data
from benchmarks._training.ways import SFT, SFT_CHECKPOINTS, STOCK, TRAINER

Record = dict[str, Any]

PARTS = ("ways", "padding", "attention")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update the page."""
    options = _options().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run("training", arguments)
    sections: list[str] = []
    if "ways" in options.parts:
        sections += _ways(options)
    if "padding" in options.parts:
        setting = next((way for way in options.ways if way not in (*STOCK, FULL)), "100+156")
        sections.append(f"Share of padding among the positions of all batches, pruned to {setting}.")
        sections.append(report.padding_table(padding.shares(_setting(setting), options.seed)))
    if "attention" in options.parts:
        forms = attention_table(getattr(torch, options.dtype), options.attention_repeats)
        sections += ["Forward and backward of one attention module, with a mask for each row.", forms]
    text = run.text(options.dtype, *(section for section in sections if section))
    if options.trl is not None:
        # Not in single backticks: docs/regenerate.sh would run it, without a Python for TRL.
        text = text.replace(f"`{run.command}`", f"```text\n{_shown(run.command, options.trl)}\n```", 1)
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


def _shown(command: str, python: Path) -> str:
    """Return the command without folders of this machine."""
    words = command.replace(str(python), "PYTHON").split()
    if "--json" in words:
        del words[words.index("--json") : words.index("--json") + 2]
    return " ".join(words)


def _ways(options: argparse.Namespace) -> list[str]:
    lengths = sample(options.batch, options.batches, options.seed)
    geometry = _geometry(options)
    records = []
    for record in _measure_rounds(options, _chosen(options), lengths, geometry):
        records.append(record)
        print(json.dumps(record), file=sys.stderr, flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(record) + "\n")
    predicted = {
        way: _predicted(way, geometry, lengths, options)
        for way in dict.fromkeys(record["way"] for record in records)
    }
    return [
        _description(options, records, lengths),
        report.verdict(records),
        report.ways_table(records, predicted),
        "Factors within a round, median (lowest – highest):",
        report.factors_table(records),
    ]


def _chosen(options: argparse.Namespace) -> list[str]:
    """Return the ways that this machine can run."""
    if options.trl is None and {SFT, SFT_CHECKPOINTS} & set(options.ways):
        print("skipping SFTTrainer: give --trl, a Python with trl and datasets", file=sys.stderr)
        return [way for way in options.ways if way not in (SFT, SFT_CHECKPOINTS)]
    return list(options.ways)


def _measure_rounds(
    options: argparse.Namespace, ways: Sequence[str], lengths: Sequence[Length], geometry: Geometry
) -> Iterator[Record]:
    """Train once in each way to count FLOPs, then in turn, several rounds. Every other round is reversed.

    No round starts that would probably end later than ``--seconds`` from now, except the first.
    """
    begin = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="training-")))
        write_data(folder, geometry)
        workers, rounds = {}, begin
        for way in ways:
            given = worker_options(options, folder, way, lengths, geometry)
            python = str(options.trl) if way in (SFT, SFT_CHECKPOINTS) else sys.executable
            worker = Worker(python, given, folder / f"{way}.log", module="benchmarks._training.worker")
            workers[way] = stack.enter_context(worker)
        for turn in range(-1, options.repeats):
            now = time.perf_counter()
            rounds = now if turn == 0 else rounds
            if turn > 0 and now - begin + (now - rounds) / turn > options.seconds:
                break
            for way in ways[:: -1 if turn % 2 else 1]:
                job = {"turn": max(turn, 0), "count": turn < 0}
                load = os.getloadavg()[0]
                yield {
                    **workers[way].run(job),
                    "way": way,
                    "turn": turn,
                    "load": load,
                    "versions": workers[way].versions,
                }


def worker_options(
    options: argparse.Namespace, folder: Path, way: str, lengths: Sequence[Length], geometry: Geometry
) -> Record:
    """Return the options of the process of one way."""
    return {
        "way": way,
        "folder": str(folder),
        "geometry": dataclasses.asdict(geometry),
        "lengths": lengths,
        "batch": options.batch,
        "rank": options.rank,
        "dtype": options.dtype,
        "attention": options.attention,
        "threads": options.threads,
    }


def _predicted(way: str, geometry: Geometry, lengths: Sequence[Length], options: argparse.Namespace) -> int:
    """Predict the FLOPs of an image, without padding, averaged over the rows."""
    config = geometry.config()
    skip = None if way in (*STOCK, FULL) else _setting(way)
    # Products of the LM head: the recipe runs it at the answers, forward and backward. The stock ways run it
    # everywhere. Off GPUs, SFTTrainer does so too, and computes its products once more in the backward.
    head = 2 * geometry.hidden * geometry.vocabulary
    total = 0
    for question, answer in lengths:
        new = answer + 1  # with the token that ends it
        cost = sv.predict_cost(
            config, skip, text_tokens=question, new_tokens=new, lora_rank=options.rank, dtype=torch.bfloat16
        )
        total += cost.train_flops
        if way in STOCK:
            everywhere = (geometry.image // geometry.patch) ** 2 + question + new
            total += ((2 if way == TRAINER else 3) * everywhere - 2 * new) * head
        if way == SFT_CHECKPOINTS:
            total += cost.teacher_flops - cost.vision_flops - new * head
    return total // len(lengths)


def _description(options: argparse.Namespace, records: Sequence[Record], lengths: Sequence[Length]) -> str:
    geometry, loads = _geometry(options), Spread.of([record["load"] for record in records])
    questions, answers = (Spread.of([length[part] for length in lengths]).text() for part in range(2))
    image = (geometry.image // geometry.patch) ** 2
    others = {record["versions"] for record in records} - {_measure.versions()}
    model = (
        f"model: {geometry.layers} layers of width {geometry.hidden}, FFN {geometry.intermediate}, "
        f"vocabulary {geometry.vocabulary:,}, {image} visual tokens, {options.attention} attention, "
        f"LoRA of rank {options.rank}"
    )
    rows = (
        f"a round: {options.batches} batches of {options.batch} rows with one image, questions of "
        f"{questions} tokens, answers of {answers}"
    )
    rounds = f"{1 + max(record['turn'] for record in records)} rounds, load average {loads.text(digits=1)}"
    lines = [model, rows, rounds, *(f"SFTTrainer: {text}" for text in sorted(others))]
    return "\n".join(f"- {line}" for line in lines)


def _geometry(options: argparse.Namespace) -> Geometry:
    """Return a geometry whose tower has the same small share of the FLOPs as LLaVA's."""
    tower = max(64, min(1024, options.hidden // 2))
    return Geometry.scaled(
        options.hidden,
        options.layers,
        tower=tower,
        tower_layers=max(1, options.layers // 8),
        image=options.image,
    )


def _setting(name: str) -> sv.SkipConfig:
    config = _measure.setting(name)
    if config is None:
        raise SystemExit(f"{name}: expected RETAINED+SKIPPED")
    return config


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("training", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add(
        "--ways",
        nargs="+",
        default=[TRAINER, SFT, FULL, "100+156"],
        metavar="WAY",
        help=f"{', '.join(STOCK)}, {FULL} or RETAINED+SKIPPED (default: %(default)s)",
    )
    add("--trl", type=Path, metavar="PYTHON", help="a Python with trl and datasets")
    add("--batch", type=int, default=4, help="rows of a step (default: %(default)s)")
    add("--batches", type=int, default=6, help="steps of a round (default: %(default)s)")
    add("--repeats", type=int, default=3, help="rounds over all ways (default: %(default)s)")
    add("--seconds", type=float, default=math.inf, help="start no round that would end later")
    add("--attention-repeats", type=int, default=7, help="steps of each form (default: %(default)s)")
    add("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    add("--hidden", type=int, default=1024, help="width of the decoder (default: %(default)s)")
    add("--layers", type=int, default=8, help="layers of the decoder (default: %(default)s)")
    add("--image", type=int, default=336, help="side of an image in pixels (default: %(default)s)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--attention", choices=["sdpa", "eager"], default="sdpa")
    add("--threads", type=int, default=0, help="threads of each process; 0 = its own choice")
    add("--seed", type=int, default=0, help="seed of the rows' lengths (default: %(default)s)")
    add("--json", type=Path, help="file to append the records to, one JSON line each")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="training", help="name of the page's part (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
