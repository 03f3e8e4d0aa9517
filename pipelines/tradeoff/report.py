"""The report of a trade-off: tables, curves, and published next to predicted FLOPs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

from pipelines.evaluation.figures import SKIP_COLOUR, hide_box, save, subplots
from pipelines.evaluation.items import OVERALL
from pipelines.shared.console import say
from pipelines.tradeoff.config import AS_TUNED, FULL, GRID, PIXELS, SKIP_VISION
from pipelines.tradeoff.pixels import PIXELS_WITH_TOWER
from pipelines.tradeoff.published import PUBLISHED, llava_with
from pipelines.tradeoff.results import PointResult
from pipelines.tradeoff.table import table
from skipvision import SkipConfig, predict_cost
from skipvision.baselines import BASELINES

_TEXT = 16
"""Text tokens in a prompt; with this number the prediction agrees with the paper's FLOPs."""
_COSTS = {
    "language_flops": "prefill FLOPs after the tower, %",
    "latency": "time to the first token, %",
    "kv_bytes": "KV bytes, %",
}

_COLOURS = ("blue", "cyan", "green", "red", "purple", "brown", "pink", "olive")
"""Colours of the baselines. Skip-Vision is orange, the grid grey."""


def write_report(
    results: Sequence[PointResult], folder: Path, *, rows: int, text_tokens: int
) -> dict[str, str]:
    """Write tables, numbers and figures, named after the folder. Return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "table": folder / f"{folder.name}_table.md",
        "numbers": folder / f"{folder.name}.json",
        "picture": folder / f"{folder.name}.png",
        "published": folder / "tradeoff_published.png",
    }
    paths["table"].write_text(table(results, rows=rows, text_tokens=text_tokens))
    paths["numbers"].write_text(
        json.dumps([asdict(one) | _json_point(one) for one in results], indent=1) + "\n"
    )
    save(curves(results), paths["picture"], dpi=110)
    _published(paths["published"])
    say(f"\n{paths['table'].read_text()}")
    return {name: str(path) for name, path in paths.items()}


def _json_point(one: PointResult) -> dict[str, Any]:
    skip = one.point.skip
    return {"point": {**asdict(one.point), "skip": None if skip is None else skip.model_dump()}}


def curves(results: Sequence[PointResult]) -> Any:
    """Draw overall accuracy against each cost, in one row of panels per adapter."""
    labels = list(dict.fromkeys(one.point.adapter for one in results))
    costs = {name: title for name, title in _COSTS.items() if getattr(results[0], name) is not None}
    size = (4.6 * len(costs), 3.4 * len(labels) + 0.8)
    figure, axes = subplots(len(labels), len(costs), size=size, squeeze=False, sharey="row")
    for row, label in zip(axes, labels, strict=True):
        own = [one for one in results if one.point.adapter == label]
        for axis, (cost, title) in zip(row, costs.items(), strict=True):
            _panel(axis, own, cost)
            axis.set_xlabel(title)
            hide_box(axis)
        row[0].set_title(label, loc="left", fontsize=10)
        row[0].set_ylabel("exact match, %")
    shown: dict[str, Any] = {}  # a panel may lack some of the methods
    for axis in axes.flat:
        handles, names = axis.get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    figure.legend(
        list(shown.values()), list(shown), ncols=6, loc="outside upper center", frameon=False, fontsize=8
    )
    return figure


def _panel(axis: Any, own: Sequence[PointResult], cost: str) -> None:
    def line(some: Sequence[PointResult], **style: Any) -> None:
        ordered = sorted(some, key=lambda one: getattr(one, cost))
        axis.plot(
            [100 * getattr(one, cost) for one in ordered],
            [100 * one.accuracy[OVERALL] for one in ordered],
            **style,
        )

    grid = [one for one in own if one.point.method == GRID]
    retained = sorted({one.point.skip.retained for one in grid if one.point.skip})
    for rank, count in enumerate(retained):
        chosen = [one for one in grid if one.point.skip and one.point.skip.retained == count]
        shade = 0.75 - 0.6 * rank / max(len(retained) - 1, 1)
        line(chosen, color=str(shade), lw=1, marker=".", ms=4, label=f"N_r = {count}")
    full = next(one for one in own if one.point.method == FULL)
    compared_with = 100 * full.gap[OVERALL].reference
    axis.axhline(compared_with, color="#5b6b7f", lw=0.8, ls=":", label="reference: full tokens")
    methods = (*BASELINES, PIXELS, PIXELS_WITH_TOWER)
    for method, marker, colour in zip(methods, cycle("ov^<>DPX"), cycle(_COLOURS), strict=False):
        some = [one for one in own if one.point.method == method]
        if some and method != SKIP_VISION:
            line(some, color=f"tab:{colour}", marker=marker, ms=5, lw=0.8, alpha=0.8, label=method)
    for method, marker in ((SKIP_VISION, "s"), (AS_TUNED, "*")):
        if some := [one for one in own if one.point.method == method]:
            line(some, color=SKIP_COLOUR, marker=marker, ms=8, lw=1.5, label=method)


def _published(path: Path) -> None:
    """Draw predicted prefill FLOPs over N_r for some N_s, with the paper's points, for both decoders."""
    decoders = list(dict.fromkeys(point.decoder for point in PUBLISHED))
    figure, axes = subplots(1, len(decoders), size=(11, 4), sharey=True)
    for axis, decoder in zip(axes, decoders, strict=True):
        for skipped in (0, 156, 320):
            counts = [count for count in range(16, 577, 40) if count + skipped <= 576]
            shares = [100 * _predicted(decoder, count, skipped, 576) for count in counts]
            axis.plot(counts, shares, marker=".", label=f"predicted, 576 tokens, N_s = {skipped}")
        for point in (point for point in PUBLISHED if point.decoder == decoder):
            label = f"{point.retained} + {point.skipped} of {point.tokens}"
            own = 100 * _predicted(decoder, point.retained, point.skipped, point.tokens)
            axis.plot(point.retained, own, "o", color=SKIP_COLOUR, fillstyle="none", ms=9)
            axis.annotate(
                label, (point.retained, own), textcoords="offset points", xytext=(8, -10), fontsize=8
            )
            if point.flops is not None:
                axis.plot(point.retained, 100 * point.flops, "x", color="black", ms=8)
        axis.plot([], [], "o", color=SKIP_COLOUR, fillstyle="none", label="published settings, predicted")
        if any(point.flops for point in PUBLISHED if point.decoder == decoder):
            axis.plot([], [], "x", color="black", label="published settings, published FLOPs")
        axis.set_title(decoder, fontsize=10)
        axis.set_xlabel("retained tokens N_r")
        axis.legend(fontsize=7, frameon=False)
        hide_box(axis)
    axes[0].set_ylabel("prefill FLOPs, % of full tokens (tower included)")
    save(figure, path, dpi=110)


def _predicted(decoder: str, retained: int, skipped: int, tokens: int) -> float:
    cost = predict_cost(
        llava_with(decoder),
        SkipConfig(retained=retained, skipped=skipped),
        text_tokens=_TEXT,
        new_tokens=1,
        visual_tokens=tokens,
    )
    return cost.ratio_to_full.prefill_flops
