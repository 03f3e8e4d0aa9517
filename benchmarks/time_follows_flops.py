"""Does time follow FLOPs? Full tokens against Skip-Vision, prefill and LoRA step, on a CPU.

The model is a LLaVA with random weights. Its layers divide their FLOPs as Llama-3-8B's do (projections of
attention 19 %, FFN 81 %), and its vision tower has the same small share. All settings are measured in turn
within one run, so that changes in the machine's load affect them equally.

    python -m benchmarks run time_follows_flops --repeats 9 --out docs/benchmarks/time_follows_flops.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import skipvision as sv
from benchmarks import _measure
from benchmarks._measure import FULL, Clock, Geometry, LoraStep, Sample, Spread
from benchmarks._run import Run

TARGET = 1.15
"""Max time ratio ÷ FLOPs ratio that the project promises."""

Call = Callable[[sv.Attachment | None], object]


@dataclass(frozen=True)
class Row:
    """Results of one setting in one dtype."""

    setting: str
    predicted: int
    measured: int
    samples: list[Sample]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update the page."""
    options = _options().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Run("time_follows_flops", arguments)
    sections = []
    for dtype in options.dtype:
        if dtype == "bfloat16" and not _measure.native_bfloat16():
            print("skipping bfloat16: this CPU does not multiply it natively", file=sys.stderr)
            continue
        sections += _measure_dtype(options, dtype)
    text = run.text("", _describe(options), *sections)
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


def _measure_dtype(options: argparse.Namespace, dtype: str) -> list[str]:
    """Return both tables of one dtype as Markdown."""
    device = torch.device("cpu")
    model = _measure.build(_geometry(options), device, getattr(torch, dtype))
    inputs = _measure.inputs_for(model, options.batch, options.text)
    sections = []

    def predict(config: sv.SkipConfig | None) -> sv.Cost:
        return sv.predict_cost(
            model.config, config, text_tokens=options.text - options.answer, new_tokens=options.answer
        )

    def predict_prefill(config: sv.SkipConfig | None) -> int:
        return sv.predict_cost(model.config, config, text_tokens=options.text).prefill_flops

    share = predict(None).vision_flops / predict_prefill(None)
    if "prefill" in options.piece:
        rows = _measure_settings(options, model, lambda _: _measure.prefill(model, inputs), predict_prefill)
        sections.append(
            f"### Prefill, {dtype}\n\nTower and projector are {share:.1%} of the full FLOPs.\n\n"
            + _table(rows)
        )
    if "train" in options.piece:
        tuned = _measure.add_lora(model, options.rank)
        step = LoraStep(tuned, inputs, options.answer)
        rows = _measure_settings(options, tuned, step, lambda config: predict(config).train_flops)
        title = (
            f"### LoRA training step, {dtype}\n\nRank {options.rank} on every linear layer of the decoder, "
            f"{options.answer} answer tokens, AdamW's step included."
        )
        sections.append(f"{title}\n\n{_table(rows)}")
    return sections


def _measure_settings(
    options: argparse.Namespace, model: nn.Module, call: Call, predict: Callable[[sv.SkipConfig | None], int]
) -> list[Row]:
    clock = Clock(torch.device("cpu"))
    settings = {name: _measure.setting(name) for name in [FULL, *options.settings]}
    flops = {}
    for name, config in settings.items():
        # Counting runs the call, so it is a warm-up as well.
        flops[name] = sv.measure_flops(partial(_measure.timed, model, config, clock, call))
        if options.profile:
            _print_profile(name, partial(_measure.timed, model, config, clock, call))
    cases = {name: partial(_measure.timed, model, config, clock, call) for name, config in settings.items()}
    samples = _measure.interleaved(cases, options.repeats)
    return [
        Row(name, options.batch * predict(config), flops[name], samples[name])
        for name, config in settings.items()
    ]


def _table(rows: Sequence[Row]) -> str:
    full = rows[0]
    cells = []
    for row in rows:
        # Pair the samples of a round: they were measured within the same few seconds.
        pairs = zip(row.samples, full.samples, strict=True)
        ratio = Spread.of([sample.total / whole.total for sample, whole in pairs])
        flops = row.measured / full.measured
        planning = Spread.of([sample.planning / sample.total for sample in row.samples])
        restoring = Spread.of([sample.restoring / sample.total for sample in row.samples])
        gap = ratio.median / flops
        cells.append(
            [
                row.setting,
                f"{row.predicted / 1e9:,.1f}",
                f"{row.measured / 1e9:,.1f}",
                Spread.of([sample.total for sample in row.samples]).text(1000),
                f"{flops:.3f}",
                ratio.text(digits=3),
                f"{gap:.2f}" if gap <= TARGET else f"**{gap:.2f}**",
                f"{planning.median:.1%}",
                f"{restoring.median:.1%}",
            ]
        )
    head = [
        "retained+skipped",
        "GFLOPs predicted",
        "GFLOPs measured",
        "ms: median (min – max)",
        "FLOPs ratio",
        "time ratio",
        "time ÷ FLOPs",
        "planning",
        "restoring",
    ]
    return _measure.table(head, cells)


def _print_profile(name: str, call: Callable[[], Sample]) -> None:
    """Print the time of one call by operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        sample = call()
    print(f"\n{name}: {sample}")
    print(
        profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)
    )


def _geometry(options: argparse.Namespace) -> Geometry:
    """Return a geometry whose tower is in proportion to the decoder."""
    # Few wide layers instead of many narrow ones, so that its products are as efficient as the decoder's.
    tower = max(64, min(1024, options.hidden // 2))
    tower_layers = max(1, options.layers // 8)
    return Geometry.scaled(
        options.hidden, options.layers, tower=tower, tower_layers=tower_layers, image=options.image
    )


def _describe(options: argparse.Namespace) -> str:
    g = _geometry(options)
    return (
        f"Decoder: {g.layers} layers, hidden {g.hidden}, FFN {g.intermediate}, {g.heads} query and "
        f"{g.key_heads} key heads; tower: {g.tower_layers} layers, hidden {g.tower_hidden}, "
        f"{(g.image // g.patch) ** 2} visual tokens; {options.text} text tokens, batch {options.batch}, "
        f"{options.repeats} rounds."
    )


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("time_follows_flops", __doc__)
    add = parser.add_argument
    add("--hidden", type=int, default=1024, help="width of the decoder (FFN: 3.5 times as wide)")
    add("--layers", type=int, default=8, help="decoder layers")
    add("--image", type=int, default=336, help="pixels per side; 336 make 576 visual tokens")
    add("--text", type=int, default=32, help="text tokens of a row, answer included")
    add("--answer", type=int, default=16, help="text tokens at which the training step takes its loss")
    add("--batch", type=int, default=1)
    add("--rank", type=int, default=16, help="LoRA rank")
    add("--settings", nargs="+", default=["100+156", "256+320", "144+144"], metavar="RETAINED+SKIPPED")
    add("--repeats", type=int, default=9, help="rounds over all settings")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--piece", nargs="+", default=["prefill", "train"], choices=["prefill", "train"])
    add("--threads", type=int, default=0, help="torch threads (0: torch's choice)")
    add("--profile", action="store_true", help="print a profile of one call of every setting")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="table", help="name of the page's generated part")
    return parser


if __name__ == "__main__":
    main()
