"""Prefill, decode step and LoRA step at full size on a CUDA device: full tokens against Skip-Vision.

Needs torch, transformers, peft and this library, no other package. Weights are random and created on the
device. All pieces of a geometry run in the order of what they tell most, each within ``--seconds``. Each
prints its table at once, and appends its records to the file of ``--json``.

    python -m benchmarks run gpu --json gpu.jsonl --out docs/benchmarks/gpu.md
    python -m benchmarks run gpu --pieces train --checkpointing --json gpu.jsonl
    python -m benchmarks run gpu --geometry llava-1.5-7b --json gpu.jsonl
    python -m benchmarks run gpu --report gpu.jsonl --out docs/benchmarks/gpu.md

With ``--engine vllm``, vLLM answers requests of 1 … 64 clients, full and pruned by the plug-in:

    python -m benchmarks run gpu --engine vllm --geometry llava-1.5-7b --repeats 3 --json vllm.jsonl

To try the script without a CUDA device: ``--device cpu --tiny``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipvision as sv
from benchmarks import _gpu_report, _measure
from benchmarks._measure import FULL, Clock, Geometry, LoraStep, Sample
from benchmarks._record import today, write_part
from benchmarks._run import Run, parser, processor, versions
from skipvision._compat import compile_counters, raise_recompile_limits
from skipvision.anatomy.families import dissect
from skipvision.kv_cache import cache_bytes

_CLIP_L = {"tower_hidden": 1024, "tower_intermediate": 4096, "tower_layers": 24, "tower_heads": 16}
GEOMETRIES = {
    "llava-1.5-7b": Geometry(
        hidden=4096, intermediate=11008, layers=32, heads=32, key_heads=32, vocabulary=32064, **_CLIP_L
    ),
    "llama-3-8b": Geometry(
        hidden=4096, intermediate=14336, layers=32, heads=32, key_heads=8, vocabulary=128320, **_CLIP_L
    ),
}
"""CLIP-L/336 with Vicuna-7B and with Llama-3-8B."""

TINY = Geometry(
    hidden=64,
    intermediate=224,
    layers=3,
    heads=4,
    key_heads=2,
    vocabulary=256,
    tower_hidden=32,
    tower_intermediate=64,
    tower_layers=2,
    tower_heads=2,
    image=84,
)
SETTINGS = ["100+156", "256+320", "144+144"]
TINY_SETTINGS = ["8+10", "9+9"]
COMPILED = "-compiled"
"""End of the names of pieces with compiled layers."""
PIECES = ["prefill", "decode", "train", "prefill-compiled", "decode-compiled", "train-compiled"]

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all pieces, or report on earlier runs."""
    options = _options().parse_args(arguments)
    if options.report:
        records = [json.loads(line) for line in options.report.read_text().splitlines() if line.strip()]
        print(_gpu_report.report(records))
        _write(options, records)
        return
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: add --device cpu --tiny to try the script without one")
    run, begin = Run("gpu", arguments), time.perf_counter()
    records = []
    for found in _pieces(options, device):
        found = [{"command": run.command, "load": run.load, **record} for record in found]
        records += found
        if options.json:
            with options.json.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in found)
        if options.engine == "vllm":
            print(json.dumps(found[0]), flush=True)
        else:
            print(f"{_gpu_report.tables(found)}\n", flush=True)
            _write(options, records)
    if options.engine == "vllm":
        print(_gpu_report.report(records))
        _write(options, records)
    print(f"{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)


def _write(options: argparse.Namespace, records: Sequence[Record]) -> None:
    if options.out:
        write_part(options.out, options.part, _gpu_report.report(records))


def _pieces(options: argparse.Namespace, device: torch.device) -> Iterator[list[Record]]:
    """Measure piece by piece. Those with compiled layers are last, because compiling takes long."""
    if options.engine == "vllm":
        from benchmarks._engines.on_gpu import measure_vllm

        # vLLM's tokenizer needs a token for each byte, and its attention on CPUs wider heads.
        tiny = replace(TINY, vocabulary=512, heads=2, key_heads=1)
        for record in measure_vllm(options, tiny if options.tiny else GEOMETRIES[options.geometry]):
            yield [record]
        return
    for compiled in (False, True):
        own = [piece for piece in options.pieces if piece.endswith(COMPILED) == compiled]
        if own and compiled:
            # One graph for each layer, length and batch. Beyond its default limit dynamo falls back to eager.
            raise_recompile_limits(1024, accumulated=4096)
        for batch in options.batch:
            for piece in own:
                gc.collect()  # free the last model before the next one is built
                options.piece, options.compiled = piece.removesuffix(COMPILED), compiled
                yield measure(options, device, batch)


def measure(options: argparse.Namespace, device: torch.device, batch: int) -> list[Record]:
    """Measure one piece at one batch size; returns a record for each setting."""
    begin = time.perf_counter()
    geometry = TINY if options.tiny else GEOMETRIES[options.geometry]
    model = _measure.build(geometry, device, getattr(torch, options.dtype))
    inputs = _measure.inputs_for(model, batch, options.text)
    # Compiling one setting shows what compiling gains, and takes minutes.
    own = (TINY_SETTINGS if options.tiny else SETTINGS)[: 1 if options.compiled else None]
    names = [FULL, *(options.settings or own)]
    settings = {name: _measure.setting(name) for name in names}
    cases = _cases(options, model, inputs, settings)
    run = _describe(options, device, batch)
    records = {
        name: {**run, "setting": name, **_predicted(options, model, config, batch)}
        for name, config in settings.items()
    }
    generates = options.piece != "train"
    before = {n: _first_logits(model, c, inputs) for n, c in settings.items()} if generates else {}
    if options.compiled:
        for layer in dissect(model).decoder.get_submodule("layers").children():
            layer.compile()
    for name, config in settings.items():
        if time.perf_counter() - begin > options.seconds:
            records[name]["error"] = "no time left"
            continue
        records[name] |= _prepare(cases[name], device, options.compiled)
        if generates and "error" not in records[name]:
            logits, records[name]["kv_bytes"] = _first_logits(model, config, inputs)
            # Compiling may only change rounding. A larger difference means that it dropped the hooks.
            expected = before[name][0]
            records[name]["difference"] = float((logits - expected).abs().max() / expected.std())
    working = {name: case for name, case in cases.items() if "error" not in records[name]}
    left = options.seconds - (time.perf_counter() - begin)
    for name, samples in _measure.interleaved(working, options.repeats, warm_up=0, seconds=left).items():
        records[name]["seconds"] = [sample.total for sample in samples]
        records[name]["planning"] = [sample.planning for sample in samples]
        records[name]["restoring"] = [sample.restoring for sample in samples]
    return list(records.values())


def _cases(
    options: argparse.Namespace,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    settings: Mapping[str, sv.SkipConfig | None],
) -> dict[str, Callable[[], Sample]]:
    """Return, for each setting, a function that measures it once."""
    clock = Clock(model.device)
    if options.piece == "decode":
        return {n: partial(_decode, model, c, clock, inputs, options.steps) for n, c in settings.items()}
    call: Callable[[sv.Attachment | None], Any]
    if options.piece == "train":
        tuned = _measure.add_lora(model, options.rank)
        if options.checkpointing:
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        call = LoraStep(tuned, inputs, options.answer)
    else:

        def call(_: sv.Attachment | None) -> Any:
            return _measure.prefill(model, inputs)

    return {name: partial(_measure.timed, model, c, clock, call) for name, c in settings.items()}


def _describe(options: argparse.Namespace, device: torch.device, batch: int) -> Record:
    """Return the fields that all records of a run share."""
    return {
        "run": f"{time.time():.3f}",
        "date": today(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "versions": versions(),
        "geometry": "tiny" if options.tiny else options.geometry,
        "dtype": options.dtype,
        "piece": options.piece,
        "compiled": options.compiled,
        "checkpointing": options.checkpointing and options.piece == "train",
        "batch": batch,
        "text": options.text,
    }


def _decode(
    model: nn.Module,
    config: sv.SkipConfig | None,
    clock: Clock,
    inputs: Mapping[str, torch.Tensor],
    steps: int,
) -> Sample:
    """Measure the mean seconds of a decode step after a prefill."""
    mask = inputs["attention_mask"]
    with torch.no_grad(), sv.attach(model, config) if config else nullcontext():
        output = _measure.prefill(model, inputs)
        for step in range(steps + 1):
            if step == 1:
                clock.settle()
                begin = clock.mark()
            token = output.logits[:, -1:].argmax(dim=-1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(
                input_ids=token,
                attention_mask=mask,
                past_key_values=output.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
        end = clock.mark()
        clock.settle()
    return Sample(clock.between(begin, end) / steps)


def _prepare(case: Callable[[], Sample], device: torch.device, compiled: bool) -> Record:
    """Warm up one case; returns peak memory and compile statistics, or the reason why it cannot run."""
    counters = compile_counters()
    counters.clear()
    begin = time.perf_counter()
    try:
        case()
        found: Record = {"warm_up_seconds": time.perf_counter() - begin}
        case()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            case()
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    if compiled:
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["graph_breaks"] = dict(counters["graph_break"])
    return found


def _first_logits(
    model: nn.Module, config: sv.SkipConfig | None, inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, int]:
    """Return the logits of a prefill and the bytes of its cache."""
    with sv.attach(model, config) if config else nullcontext():
        output = _measure.prefill(model, inputs)
        return output.logits.float(), cache_bytes(output.past_key_values)


def _predicted(
    options: argparse.Namespace, model: nn.Module, config: sv.SkipConfig | None, batch: int
) -> Record:
    if options.piece == "train":
        text, new = options.text - options.answer, options.answer
    else:
        text, new = options.text, options.steps + 1
    cost = sv.predict_cost(
        model.config, config, text_tokens=text, new_tokens=new, lora_rank=options.rank, dtype=model.dtype
    )
    flops = {
        "prefill": cost.prefill_flops,
        "train": cost.train_flops,
        "decode": cost.decode_flops // options.steps,
    }
    return {"flops": batch * flops[options.piece], "kv_bytes_predicted": batch * cost.kv_bytes}


def _options() -> argparse.ArgumentParser:
    options = parser("gpu", __doc__)
    add = options.add_argument
    add("--engine", choices=["library", "vllm"], default="library")
    add("--geometry", choices=list(GEOMETRIES), default="llama-3-8b")
    add(
        "--pieces", nargs="+", choices=PIECES, default=PIECES, metavar="PIECE", help=f"of {', '.join(PIECES)}"
    )
    add("--batch", type=int, nargs="+", default=[8, 1])
    add("--seconds", type=float, default=200, help="max seconds of a piece (default: %(default)s)")
    add("--settings", nargs="+", metavar="RETAINED+SKIPPED", help=f"default: {' '.join(SETTINGS)}")
    add("--checkpointing", action="store_true", help="gradient checkpointing in the training step")
    add("--text", type=int, default=64, help="text tokens of a row, answer included")
    add("--answer", type=int, default=32, help="text tokens at which the training step takes its loss")
    add("--rank", type=int, default=16, help="LoRA rank")
    add("--steps", type=int, default=32, help="decode steps in one sample")
    add("--repeats", type=int, default=10, help="max rounds over all settings")
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32, 64], help="clients of --engine vllm")
    add("--requests", type=int, default=32, help="requests of a run of --engine vllm; at least two a client")
    add("--device", default="cuda")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--tiny", action="store_true", help="a tiny model instead of the geometry, to try the script")
    add("--json", type=Path, help="file to append the records to, one JSON line each")
    add("--report", type=Path, metavar="FILE", help="report on such a file instead of measuring")
    add("--out", type=Path, help="Markdown page to update, after each piece")
    add("--part", default="table", help="name of the page's part (default: %(default)s)")
    return options


if __name__ == "__main__":
    main()
