"""The cost of planning (select, merge, summary), by itself and as a share of a prefill.

    python -m benchmarks run planning --out docs/benchmarks/planning.md

The first table times the steps on random embeddings of Llama-3-8B's width, and compares their FLOPs with its
prefill. The second table times real prefills of a narrower decoder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import skipvision as sv
from benchmarks import _measure
from benchmarks._measure import Clock, Geometry, Spread
from benchmarks._run import Run
from benchmarks.gpu import GEOMETRIES
from skipvision.anatomy.images import Images
from skipvision.layout import lay_out
from skipvision.merge import assign, merge_tokens
from skipvision.select import CRITERIA, top
from skipvision.summary import SummaryLayer
from skipvision.tokens import VisualTokens

TEXT = 32
"""Number of text tokens of every row."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with --out, update the page."""
    options = _options().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    run = Run("planning", arguments)
    parts = [
        _part(select, tokens, batch, options.width, dtype, options.repeats)
        for select in options.select
        for tokens in options.tokens
        for batch in options.batch
    ]
    head = ["criterion", "tokens", "batch", "total ms (min – max)", "select", "assign", "lay out", "merge"]
    head += ["summary", "FLOPs ÷ prefill's", "FLOPs ÷ full prefill's"]
    shares = ["criterion", "tokens", "batch", "prefill ms", "planning ms", "share", "restoring"]
    prefills = [
        _prefill(select, tokens, batch, options, dtype)
        for select in options.select
        for tokens, batch in options.prefill
    ]
    text = run.text(
        options.dtype,
        f"### Steps, width {options.width}, a quarter retained and a quarter skipped (ms)",
        _measure.table(head, parts),
        f"### Share of the reduced prefill, decoder of {options.layers} layers, hidden {options.hidden}",
        _measure.table(shares, prefills),
    )
    print(text)
    if options.out:
        _measure.write_part(options.out, options.part, text)


def _config(select: str = "similarity") -> sv.SkipConfig:
    return sv.SkipConfig(retained=0.25, skipped=0.25, select=select)


def _part(select: str, tokens: int, batch: int, width: int, dtype: torch.dtype, repeats: int) -> list[str]:
    """Measure one row of the first table: a batch of prompts with one image each."""
    generator = torch.Generator().manual_seed(0)
    config = _config(select)
    visual = torch.zeros(batch, tokens + TEXT, dtype=torch.bool)
    visual[:, 4 : 4 + tokens] = True
    embeds = torch.randn(*visual.shape, width, generator=generator).to(dtype)
    mask = torch.ones_like(visual)
    layer = SummaryLayer(width, config.summary_tokens)
    runs = []
    for _ in range(repeats + 1):
        seconds: dict[str, float] = {}

        def step(name: str, work: Callable[..., Any], *args: Any, into: dict[str, float] = seconds) -> Any:
            begin = time.perf_counter()
            result = work(*args)
            into[name] = into.get(name, 0.0) + time.perf_counter() - begin
            return result

        with torch.no_grad():
            images = step("select", Images.locate, visual, [tokens] * batch)
            visual_tokens = VisualTokens(step("select", images.take, embeds), images.valid)
            counts = torch.tensor([config.counts(tokens)] * batch)
            scores = step("select", CRITERIA[select].score, visual_tokens, counts[:, 0], 0)
            retained = step("select", top, scores, images.valid, counts[:, 0])
            ends = step("assign", config.merging.ends, visual_tokens, retained, counts[:, 1])
            target = step("assign", assign, visual_tokens, retained, ends)
            plan = step("lay out", lay_out, images, mask, retained, target, config)
            reduced = step("merge", merge_tokens, embeds, plan)
            step("summary", layer, reduced, plan)
        runs.append(seconds)
    runs = runs[1:]
    big = GEOMETRIES["llama-3-8b"].config()
    cost = sv.predict_cost(big, config, text_tokens=TEXT, visual_tokens=tokens)
    whole = cost.full.prefill_flops if cost.full else cost.prefill_flops
    return [
        select,
        f"{tokens:,}",
        str(batch),
        Spread.of([sum(run.values()) for run in runs]).text(1000, 1),
        *(f"{1000 * Spread.of([run[name] for run in runs]).median:.1f}" for name in runs[0]),
        f"{cost.planning_flops / cost.prefill_flops:.3%}",
        f"{cost.planning_flops / whole:.3%}",
    ]


def _prefill(
    select: str, tokens: int, batch: int, options: argparse.Namespace, dtype: torch.dtype
) -> list[str]:
    """Measure one row of the second table. The tower is small, so that the decoder dominates."""
    side = round(tokens**0.5)
    geometry = Geometry.scaled(options.hidden, options.layers, tower=64, tower_layers=2, image=14 * side)
    model = _measure.build(geometry, torch.device("cpu"), dtype)
    inputs = _measure.inputs_for(model, batch, TEXT)
    clock = Clock(torch.device("cpu"))
    samples = [
        _measure.timed(model, _config(select), clock, lambda _: _measure.prefill(model, inputs))
        for _ in range(options.prefill_repeats + 1)
    ][1:]
    return [
        select,
        f"{side * side:,}",
        str(batch),
        Spread.of([sample.total for sample in samples]).text(1000),
        Spread.of([sample.planning for sample in samples]).text(1000, 1),
        f"{Spread.of([sample.planning / sample.total for sample in samples]).median:.1%}",
        f"{Spread.of([sample.restoring / sample.total for sample in samples]).median:.1%}",
    ]


def _pair(text: str) -> tuple[int, int]:
    tokens, batch = text.split("x")
    return int(tokens), int(batch)


def _options() -> argparse.ArgumentParser:
    parser = _measure.parser("planning", __doc__)
    add = parser.add_argument
    add(
        "--select",
        nargs="+",
        default=["similarity", "diversity"],
        choices=[name for name in CRITERIA if CRITERIA[name].reads == "features"],
    )
    add("--tokens", type=int, nargs="+", default=[576, 2880], help="visual tokens of an image")
    add("--batch", type=int, nargs="+", default=[1, 16])
    add("--width", type=int, default=4096, help="width of the embeddings in the first table")
    add("--repeats", type=int, default=9, help="runs of each row in the first table")
    add("--prefill", type=_pair, nargs="+", default=[(576, 1), (576, 16), (2880, 1)], metavar="TOKENSxBATCH")
    add("--hidden", type=int, default=1024, help="width of the decoder in the second table")
    add("--layers", type=int, default=8)
    add("--prefill-repeats", type=int, default=5)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--threads", type=int, default=0, help="torch threads (0: torch's choice)")
    add("--out", type=Path, help="Markdown page to update")
    add("--part", default="table", help="name of the page's generated part")
    return parser


if __name__ == "__main__":
    main()
