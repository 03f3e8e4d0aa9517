"""Prefill, LoRA step and decode step at full size on a CUDA device: full tokens against Skip-Vision.

Needs torch, transformers, peft and this library. Weights are random and created on the device.
Every run takes a few minutes and appends JSON lines to a file; ``--report`` prints the tables.

    python -m benchmarks.gpu --geometry llama-3-8b --piece prefill --out gpu.jsonl
    python -m benchmarks.gpu --geometry llama-3-8b --piece train --checkpointing --out gpu.jsonl
    python -m benchmarks.gpu --geometry llama-3-8b --piece prefill --compiled --out gpu.jsonl
    python -m benchmarks.gpu --report gpu.jsonl --page docs/benchmarks/gpu.md

With ``--engine vllm``, vLLM answers requests of 1 … 64 clients, full and pruned by the plug-in:

    python -m benchmarks.gpu --engine vllm --geometry llava-1.5-7b --repeats 3 --out vllm.jsonl

To try the script without a CUDA device: ``--device cpu --tiny``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import skipvision as sv
from benchmarks import _measure
from benchmarks._engines.on_gpu import measure_vllm
from benchmarks._engines.report import report as report_engines
from benchmarks._measure import FULL, Clock, Geometry, LoraStep, Sample, Spread
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

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one piece, or report on earlier runs."""
    options = _options().parse_args(arguments)
    if options.report:
        text = report([json.loads(line) for line in options.report.read_text().splitlines() if line.strip()])
        print(text)
        if options.page:
            _measure.write_part(options.page, "table", text)
        return
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: add --device cpu --tiny to try the script without one")
    if options.compiled:
        # One graph for each layer, length and batch. Beyond its default limit dynamo falls back to eager.
        raise_recompile_limits(1024, accumulated=4096)
    begin = time.perf_counter()
    for record in _records(options, device):
        line = json.dumps(record)
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")
    print(f"{time.perf_counter() - begin:.0f} s in all", file=sys.stderr)


def _records(options: argparse.Namespace, device: torch.device) -> Iterator[Record]:
    if options.engine == "vllm":
        # vLLM's tokenizer needs a token for each byte, and its attention on CPUs wider heads.
        tiny = replace(TINY, vocabulary=512, heads=2, key_heads=1)
        yield from measure_vllm(options, tiny if options.tiny else GEOMETRIES[options.geometry])
        return
    for batch in options.batch:
        gc.collect()  # free the last batch's model before the next one is built
        yield from measure(options, device, batch)


def measure(options: argparse.Namespace, device: torch.device, batch: int) -> list[Record]:
    """Measure one piece at one batch size; returns a record for each setting."""
    geometry = TINY if options.tiny else GEOMETRIES[options.geometry]
    model = _measure.build(geometry, device, getattr(torch, options.dtype))
    inputs = _measure.inputs_for(model, batch, options.text)
    names = [FULL, *(options.settings or (TINY_SETTINGS if options.tiny else SETTINGS))]
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
        records[name] |= _prepare(cases[name], device, options.compiled)
        if generates and "error" not in records[name]:
            logits, records[name]["kv_bytes"] = _first_logits(model, config, inputs)
            # Compiling may only change rounding. A larger difference means that it dropped the hooks.
            expected = before[name][0]
            records[name]["difference"] = float((logits - expected).abs().max() / expected.std())
    working = {name: case for name, case in cases.items() if "error" not in records[name]}
    for name, samples in _measure.interleaved(working, options.repeats).items():
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
        "date": _measure.today(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _measure.processor(),
        "versions": _measure.versions(),
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


# ----------------------------------------------------------------------------------------- report


def report(records: Sequence[Record]) -> str:
    """Format all runs as Markdown, with one table each."""
    engines = [record for record in records if "engine" in record]
    if engines:
        return report_engines(engines)
    runs: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        runs[record["run"], record["batch"]].append(record)
    return "\n\n".join(_report_run(run) for run in runs.values())


def _report_run(records: Sequence[Record]) -> str:
    first = records[0]
    work = {"prefill": "Prefill", "train": "LoRA training step", "decode": "Decode step"}[first["piece"]]
    notes = [f"batch {first['batch']}", first["dtype"], "compiled layers" if first["compiled"] else "eager"]
    if first["checkpointing"]:
        notes.append("gradient checkpointing (FLOPs exclude the recomputation)")
    lines = [
        f"### {work}, {first['geometry']}, {', '.join(notes)}",
        f"{first['date']}; {first['device']}; {first['versions']}; {first['text']} text tokens a row.",
        _report_table(records),
    ]
    if first["compiled"]:
        lines.append(_report_compiling(records))
    return "\n\n".join(lines)


def _report_table(records: Sequence[Record]) -> str:
    full = next((r for r in records if r["setting"] == FULL and "seconds" in r), None)
    rows = []
    for record in records:
        row = [record["setting"], f"{record['flops'] / 1e12:,.3f}"]
        if "seconds" not in record:
            rows.append([*row, record["error"], *["–"] * 6])
            continue
        row.append(Spread.of(record["seconds"]).text(1000, 1))
        if full is None:
            row += ["–"] * 3
        else:
            flops = record["flops"] / full["flops"]
            pairs = zip(record["seconds"], full["seconds"], strict=True)
            ratio = Spread.of([some / whole for some, whole in pairs])
            row += [f"{flops:.3f}", ratio.text(digits=3), f"{ratio.median / flops:.2f}"]
        planning = Spread.of(
            [part / whole for part, whole in zip(record["planning"], record["seconds"], strict=True)]
        )
        row.append(f"{planning.median:.1%}")
        row.append(f"{record['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in record else "–")
        row.append(f"{record['kv_bytes'] / 2**20:,.1f}" if "kv_bytes" in record else "–")
        rows.append(row)
    head = [
        "retained+skipped",
        "TFLOPs predicted",
        "ms: median (min – max)",
        "FLOPs ratio",
        "time ratio",
        "time ÷ FLOPs",
        "planning",
        "peak GiB",
        "KV MiB",
    ]
    return _measure.table(head, rows)


def _report_compiling(records: Sequence[Record]) -> str:
    rows = [
        [
            record["setting"],
            f"{record['warm_up_seconds']:.0f}",
            str(record["graphs"]),
            str(sum(record["graph_breaks"].values())),
            f"{record['difference']:.1e}" if "difference" in record else "–",
        ]
        for record in records
        if "graphs" in record
    ]
    head = ["retained+skipped", "compiling s", "graphs", "graph breaks", "largest Δ logit ÷ σ"]
    reasons = {reason.splitlines()[0] for record in records for reason in record.get("graph_breaks", ())}
    return "\n".join(
        [_measure.table(head, rows), "", *(f"- graph break: {reason}" for reason in sorted(reasons))]
    ).strip()


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engine", choices=["library", "vllm"], default="library")
    add("--geometry", choices=list(GEOMETRIES), default="llama-3-8b")
    add("--piece", choices=["prefill", "train", "decode"], default="prefill")
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--settings", nargs="+", metavar="RETAINED+SKIPPED", help=f"default: {' '.join(SETTINGS)}")
    add("--compiled", action="store_true", help="compile every decoder layer")
    add("--checkpointing", action="store_true", help="gradient checkpointing in the training step")
    add("--text", type=int, default=64, help="text tokens of a row, answer included")
    add("--answer", type=int, default=32, help="text tokens at which the training step takes its loss")
    add("--rank", type=int, default=16, help="LoRA rank")
    add("--steps", type=int, default=32, help="decode steps in one sample")
    add("--repeats", type=int, default=10, help="rounds over all settings")
    add("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32, 64], help="clients of --engine vllm")
    add("--requests", type=int, default=32, help="requests of a run of --engine vllm; at least two a client")
    add("--device", default="cuda")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--tiny", action="store_true", help="a tiny model instead of the geometry, to try the script")
    add("--out", type=Path, help="file to append JSON lines to")
    add("--report", type=Path, metavar="FILE", help="print the tables of such a file instead of measuring")
    add("--page", type=Path, help="with --report: Markdown page to update")
    return parser


if __name__ == "__main__":
    main()
