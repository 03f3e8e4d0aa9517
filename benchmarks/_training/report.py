"""Tables of the comparison of ways to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks._measure import FULL, Spread, table
from benchmarks._training.padding import BATCHES
from benchmarks._training.ways import STOCK, TRAINER

Record = dict[str, Any]

AIM = 5
"""Images/s of 100 + 156 tokens, divided by those of `Trainer`."""


def ways_table(records: Sequence[Record], predicted: Mapping[str, int]) -> str:
    """Format speed, memory and FLOPs of each way.

    Args:
        records: of the rounds, and one of each way that has its FLOPs.
        predicted: FLOPs of an image by way, without padding.
    """
    rows = []
    for way in _ways(records):
        rounds, (counted,) = _of(records, way, counted=False), _of(records, way, counted=True)
        peak, above = (
            max(one["peak_bytes"] for one in rounds),
            max(one["peak_bytes"] - one["idle_bytes"] for one in rounds),
        )
        rows.append(
            [
                way,
                Spread.of([one["images"] / one["seconds"] for one in rounds]).text(digits=2),
                Spread.of([one["cpu"] / one["images"] for one in rounds]).text(digits=2),
                f"{peak / 2**30:.2f}",
                f"{above / 2**30:.2f}",
                f"{counted['positions'] / counted['images']:.0f}",
                f"{predicted[way] / 1e9:,.0f}" if way in predicted else "",
                f"{counted['flops'] / counted['images'] / 1e9:,.0f}",
            ]
        )
    head = [
        "way",
        "images/s",
        "CPU s an image",
        "peak GiB",
        "above the model, GiB",
        "positions an image",
        "GFLOPs an image, predicted",
        "counted",
    ]
    return table(head, rows)


def factors_table(records: Sequence[Record]) -> str:
    """Format the factor of each way over `Trainer`, split into those of the recipe and of skipping."""
    ways = _ways(records)
    pairs = [(f"{way} : {TRAINER}", way, TRAINER) for way in ways if way in STOCK and way != TRAINER]
    if FULL in ways:
        pairs += [(f"recipe ({FULL} : {way})", FULL, way) for way in ways if way in STOCK]
    for way in ways:
        if way in STOCK or way == FULL:
            continue
        pairs += [(f"skipping ({way} : {FULL})", way, FULL)] if FULL in ways else []
        pairs += [(f"**both ({way} : {stock})**", way, stock) for stock in ways if stock in STOCK]
    rows = []
    for name, better, worse in pairs:
        ours, theirs = (_of(records, way, counted=False) for way in (better, worse))
        cells = [name]
        for key in ("seconds", "cpu"):
            # Rounds are paired: they were measured within the same minutes.
            ratios = [slow[key] / fast[key] for slow, fast in zip(theirs, ours, strict=True)]
            cells.append(Spread.of(ratios).text(digits=2))
        flops = [_of(records, way, counted=True)[0]["flops"] for way in (worse, better)]
        above = [max(one["peak_bytes"] - one["idle_bytes"] for one in some) for some in (theirs, ours)]
        cells += [f"{flops[0] / flops[1]:.2f}", f"{above[0] / max(above[1], 1):.2f}"]
        rows.append(cells)
    head = ["factor", "images/s", "CPU time", "FLOPs", "memory above the model"]
    return table(head, rows)


def verdict(records: Sequence[Record]) -> str:
    """Return the factor over `Trainer` and its parts in two sentences; nothing if a way is missing."""
    ways = _ways(records)
    pruned = [way for way in ways if way not in (*STOCK, FULL)]
    if not pruned or not {TRAINER, FULL} <= set(ways):
        return ""

    def factor(better: str, worse: str) -> list[float]:
        ours, theirs = (_of(records, way, counted=False) for way in (better, worse))
        pairs = list(zip(theirs, ours, strict=True))
        return [median(slow[key] / fast[key] for slow, fast in pairs) for key in ("seconds", "cpu")]

    both, recipe, skipping = factor(pruned[0], TRAINER), factor(FULL, TRAINER), factor(pruned[0], FULL)
    return (
        f"**{pruned[0]} trains {both[0]:.1f} times the images/s of `Trainer`** (aim: {AIM}), "
        f"{both[1]:.1f} times by CPU time. The recipe alone, with full tokens, is {recipe[0]:.1f} times "
        f"as fast ({recipe[1]:.1f} by CPU time), and skipping makes it {skipping[0]:.1f} times as fast "
        f"again ({skipping[1]:.1f})."
    )


def padding_table(shares: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Format shares of padding by data, order of the rows, and size of the batches."""
    rows = [
        [data, way, *(f"{share:.1%}" for share in values)]
        for data, by_way in shares.items()
        for way, values in by_way.items()
    ]
    head = ["data", "order of the rows", *(f"batch {size}" for size in BATCHES)]
    return table(head, rows)


def _ways(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(one["way"] for one in records))


def _of(records: Sequence[Record], way: str, *, counted: bool) -> list[Record]:
    own = [one for one in records if one["way"] == way and bool(one["flops"]) == counted]
    return sorted(own, key=lambda one: one["turn"])
