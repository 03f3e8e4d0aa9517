"""``python -m skipvision size``: GPUs, memory, storage and cost for a number of images a day."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from typing import Any

from skipvision.config import SkipConfig
from skipvision.cost.sizing import (
    GPUS,
    PRICES,
    Demand,
    Gpu,
    Size,
    Workload,
    demand,
    size,
    storage_per_day,
)
from skipvision.errors import ConfigError
from skipvision.loading import load_config

_DEFAULTS = Workload(1)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``size`` to its parser."""
    parser.add_argument("--model", required=True, help="folder or Hugging Face name of the model")
    parser.add_argument("--images-per-day", type=_count, required=True, help="images, one per request")
    parser.add_argument("--retained", type=_number, default=0.25, help="SkipConfig's retained (0.25)")
    parser.add_argument("--skipped", type=_number, default=0.25, help="SkipConfig's skipped (0.25)")
    parser.add_argument("--text-tokens", type=int, default=64, help="prompt tokens besides the image (64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer (64)")
    parser.add_argument("--visual-tokens", type=int, help="tokens of an image; default: the model's own")
    parser.add_argument("--peak", type=float, default=1.0, help="busiest hour relative to the mean (1)")
    parser.add_argument("--gpu", choices=GPUS, action="append", help="only this GPU; may be repeated")
    parser.add_argument("--price", type=float, help="dollars per GPU-hour instead of the list price")
    for name, text in (
        ("compute_share", "share of the peak FLOPs"),
        ("bandwidth_share", "share of the memory bandwidth"),
        ("memory_share", "share of the memory for weights and caches"),
    ):
        default = getattr(_DEFAULTS, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=default, help=f"{text} ({default})")
    parser.add_argument("--max-sequences", type=int, default=64, help="answers generated at once (64)")
    parser.add_argument("--json", action="store_true", help="print an object instead of the table")


def run(options: argparse.Namespace) -> None:
    """Print what the images of a day need, with full tokens and with Skip-Vision.

    Raises:
        SkipVisionError: the model or an option cannot be used.
    """
    work = Workload(
        images_per_day=options.images_per_day,
        text_tokens=options.text_tokens,
        new_tokens=options.new_tokens,
        visual_tokens=options.visual_tokens,
        peak=options.peak,
        compute_share=options.compute_share,
        bandwidth_share=options.bandwidth_share,
        memory_share=options.memory_share,
        max_sequences=options.max_sequences,
    )
    skip = SkipConfig(retained=options.retained, skipped=options.skipped)
    shares = [each for each in (skip.retained, skip.skipped) if isinstance(each, float)]
    if sum(shares) > 1:
        raise ConfigError(
            f"--retained {skip.retained} --skipped {skip.skipped}: together more than all visual tokens"
        )
    gpus = {name: GPUS[name] for name in options.gpu or GPUS}
    if options.price is not None:
        if not 0 < options.price < math.inf:
            raise ConfigError(f"--price {options.price}: give dollars per GPU-hour, more than 0")
        gpus = {name: replace(gpu, price=options.price) for name, gpu in gpus.items()}
    model = load_config(options.model)
    needed = {"full": demand(model, None, work), "skipped": demand(model, skip, work)}
    sizes = {
        name: {label: size(one, gpu, work) for label, one in needed.items()} for name, gpu in gpus.items()
    }
    own_price = options.price is not None
    print(
        json.dumps(_as_json(needed, gpus, sizes, work, own_price))
        if options.json
        else "\n".join(_lines(needed, sizes, work, skip, own_price))
    )


def _as_json(
    needed: dict[str, Demand],
    gpus: dict[str, Gpu],
    sizes: dict[str, dict[str, Size | None]],
    work: Workload,
    own_price: bool,
) -> dict[str, Any]:
    return {
        "workload": asdict(work),
        "prices": "--price" if own_price else PRICES,
        "per_image": {
            label: {
                "prefill_flops": one.cost.prefill_flops,
                "decode_flops": one.cost.decode_flops,
                "kv_bytes": one.kv_bytes,
                "state_bytes": one.cost.state_bytes,
            }
            for label, one in needed.items()
        },
        "weight_bytes": needed["full"].cost.weight_bytes,
        "storage_bytes_per_day": storage_per_day(work),
        "gpus": {
            name: {
                "data_sheet": asdict(gpus[name]),
                **{label: one and asdict(one) for label, one in by_label.items()},
            }
            for name, by_label in sizes.items()
        },
    }


def _lines(
    needed: dict[str, Demand],
    sizes: dict[str, dict[str, Size | None]],
    work: Workload,
    skip: SkipConfig,
    own_price: bool,
) -> list[str]:
    full, skipped = needed["full"], needed["skipped"]
    prefill, cache = (
        [one.cost.prefill_flops / 1e12 for one in (full, skipped)],
        [one.kv_bytes / 2**20 for one in (full, skipped)],
    )
    states = full.cost.state_bytes
    titles = "GPU   tokens    at once  images/s  GPUs  GPU-h/day      $/day  $/million"
    lines = [
        f"weights: {_gib(full.cost.weight_bytes)}; a worker pod needs that and 1 GiB for each reader",
        f"skipped: {_amount(skip.retained)} retained, {_amount(skip.skipped)} skipped",
        f"prompt: {full.cost.sequence:,} tokens, skipped {skipped.cost.sequence:,}",
        f"images: {work.images_per_day / 86_400:,.1f} per second",
        f"captions: {_gib(storage_per_day(work))} a day",
        f"prefill of an image: {prefill[0]:,.2f} TFLOPs, skipped {prefill[1]:,.2f}",
        f"KV cache of an answer: {cache[0]:,.0f} MiB, skipped {cache[1]:,.0f}",
        *([f"states of an answer: {states / 2**20:,.0f} MiB, also skipped"] if states else []),
        "",
        titles,
    ]
    for name, by_label in sizes.items():
        for label, one in by_label.items():
            if one is None:
                lines.append(f"{name:<6}{label:<9}  does not fit into the GPU's memory")
                continue
            lines.append(
                f"{name:<6}{label:<9}{one.sequences:>8}{one.images_per_second:>10.1f}{one.gpus:>6}"
                f"{one.gpu_hours:>11,.1f}{one.dollars_per_day:>11,.2f}{one.dollars_per_million:>11,.2f}"
            )
    assumed = (
        f"Assumed: {work.compute_share:.0%} of the peak FLOPs, {work.bandwidth_share:.0%} of the memory "
        f"bandwidth, busiest hour {work.peak:g} × the mean. "
        "Dollars count busy GPU-hours: --peak changes GPUs, not dollars."
    )
    return [
        *lines,
        "",
        assumed,
        "Prices: --price." if own_price else f"Prices: {PRICES}; give your own with --price.",
    ]


def _amount(amount: int | float) -> str:
    return f"{amount} tokens" if isinstance(amount, int) else f"{amount:.0%} of the tokens"


def _gib(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"


def _count(text: str) -> int:
    """Parse a whole number such as 1000000, 1_000_000 or 1e6."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, such as 1000000 or 1e6")
    return int(number)


def _number(text: str) -> int | float:
    """Parse a SkipConfig's amount: 64 is a count of tokens, 0.25 a share."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        message = f"{text!r} is neither a count of tokens, such as 64, nor a share, such as 0.25"
        raise argparse.ArgumentTypeError(message) from None
