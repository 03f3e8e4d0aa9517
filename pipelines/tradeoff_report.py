"""A trade-off for people: a Markdown table, the curves, and the paper's points beside predicted ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.evaluate import OVERALL
from pipelines.geometries import PUBLISHED, llava_with
from pipelines.tradeoff_points import AS_TUNED, FULL, GRID, SKIP_VISION
from skipvision import SkipConfig, predict_cost

if TYPE_CHECKING:
    from pipelines.tradeoff import Found

_TEXT = 16
"""Tokens of text that the paper's FLOPs agree with."""
_COSTS = {
    "language_flops": "prefill FLOPs behind the tower, %",
    "latency": "time to the first token, %",
    "kv_bytes": "KV bytes, %",
}


def write_report(found: Sequence[Found], folder: Path, *, rows: int, text_tokens: int) -> dict[str, str]:
    """Table, numbers and pictures into a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "table": folder / "tradeoff_table.md",
        "numbers": folder / "tradeoff.json",
        "picture": folder / "tradeoff.png",
        "published": folder / "tradeoff_published.png",
    }
    paths["table"].write_text(_table(found, rows, text_tokens))
    paths["numbers"].write_text(json.dumps([asdict(one) | _skip(one) for one in found], indent=1) + "\n")
    _curves(found, paths["picture"])
    _published(paths["published"])
    print(f"\n{paths['table'].read_text()}", flush=True)
    return {name: str(path) for name, path in paths.items()}


def _skip(one: Found) -> dict[str, Any]:
    skip = one.point.skip
    return {"point": {**asdict(one.point), "skip": None if skip is None else skip.model_dump()}}


def _table(found: Sequence[Found], rows: int, text_tokens: int) -> str:
    tasks = list(found[0].accuracy)
    lines = []
    for label in dict.fromkeys(one.point.adapter for one in found):
        own = [one for one in found if one.point.adapter == label]
        head = ["method", "kept", "FLOPs", "with tower", "KV", "latency", *tasks, "− full [95 % interval]"]
        seeds = len(own[0].by_seed)
        title = f"**{label}**" + (f", {seeds} seeds" if seeds > 1 else "")
        head += ["by seed"] if seeds > 1 else []
        lines += [title, "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        lines += [_line(_cells(one, tasks)) for one in own]
        lines.append("")
    return "\n".join(lines) + (
        f"{rows} questions, {text_tokens} tokens of text on average; exact match in %. Kept: retained + "
        "skipped visual tokens. Costs in % of full tokens: prefill FLOPs behind the vision tower, with it, "
        "KV bytes (these three predicted), and time to the first token (measured: median [quartiles] of the "
        "ratio to full tokens in the same round). Intervals by "
        "bootstrap over images and, where there are several, seeds of the fine-tune; of one seed they say "
        "nothing about others, and of two or three they are still too narrow.\n"
    )


def _cells(one: Found, tasks: Sequence[str]) -> list[str]:
    skip, gap = one.point.skip, one.gap[OVERALL]
    latency = ""
    if one.latency is not None and one.latency_quartiles is not None:
        low, high = one.latency_quartiles
        latency = f"{100 * one.latency:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
    points = (100 * value + 0.0 for value in (gap.difference, gap.low, gap.high))
    return [
        one.point.method,
        "all" if skip is None else f"{skip.retained} + {skip.skipped}",
        *(f"{100 * share:.1f}" for share in (one.language_flops, one.prefill_flops, one.kv_bytes)),
        latency,
        *(f"{100 * one.accuracy[task]:.1f}" for task in tasks),
        "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points),
        *([", ".join(f"{100 * value + 0.0:+.1f}" for value in one.by_seed)] if len(one.by_seed) > 1 else []),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _curves(found: Sequence[Found], path: Path) -> None:
    """Overall accuracy against each cost, a row of panels for each adapter."""
    plt = _pyplot()
    labels = list(dict.fromkeys(one.point.adapter for one in found))
    costs = {name: title for name, title in _COSTS.items() if getattr(found[0], name) is not None}
    size = (4.6 * len(costs), 3.4 * len(labels) + 0.8)
    figure, axes = plt.subplots(
        len(labels), len(costs), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for row, label in zip(axes, labels, strict=True):
        own = [one for one in found if one.point.adapter == label]
        for axis, (cost, title) in zip(row, costs.items(), strict=True):
            _panel(axis, own, cost)
            axis.set_xlabel(title)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{label}: exact match, %")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, ncols=6, loc="outside upper center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, own: Sequence[Found], cost: str) -> None:
    def line(some: Sequence[Found], **style: Any) -> None:
        ordered = sorted(some, key=lambda one: getattr(one, cost))
        axis.plot(
            [100 * getattr(one, cost) for one in ordered],
            [100 * one.accuracy[OVERALL] for one in ordered],
            **style,
        )

    methods = dict.fromkeys(one.point.method for one in own)
    grid = [one for one in own if one.point.method == GRID]
    retained = sorted({one.point.skip.retained for one in grid if one.point.skip})
    for place, count in enumerate(retained):
        chosen = [one for one in grid if one.point.skip and one.point.skip.retained == count]
        shade = 0.75 - 0.6 * place / max(len(retained) - 1, 1)
        line(chosen, color=str(shade), lw=1, marker=".", ms=4, label=f"N_r = {count}")
    full = next(one for one in own if one.point.method == FULL)
    axis.axhline(100 * full.accuracy[OVERALL], color="#5b6b7f", lw=0.8, ls=":")
    markers = iter("ov^<>DPX")
    for method in methods:
        if method not in (GRID, FULL, AS_TUNED, SKIP_VISION):
            some = [one for one in own if one.point.method == method]
            line(some, marker=next(markers), ms=5, lw=0.8, alpha=0.8, label=method)
    for method, marker in ((SKIP_VISION, "s"), (AS_TUNED, "*")):
        if some := [one for one in own if one.point.method == method]:
            line(some, color="#e07b26", marker=marker, ms=8, lw=1.5, label=method)


def _published(path: Path) -> None:
    """Predicted prefill FLOPs over N_r for some N_s, with the paper's points, for both decoders."""
    plt = _pyplot()
    decoders = list(dict.fromkeys(point.decoder for point in PUBLISHED))
    figure, axes = plt.subplots(1, len(decoders), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, decoder in zip(axes, decoders, strict=True):
        for skipped in (0, 156, 320):
            counts = [count for count in range(16, 577, 40) if count + skipped <= 576]
            shares = [100 * _predicted(decoder, count, skipped, 576) for count in counts]
            axis.plot(counts, shares, marker=".", label=f"predicted, 576 tokens, N_s = {skipped}")
        for point in (point for point in PUBLISHED if point.decoder == decoder):
            said = f"{point.retained} + {point.skipped} of {point.tokens}"
            own = 100 * _predicted(decoder, point.retained, point.skipped, point.tokens)
            axis.plot(point.retained, own, "o", color="#e07b26", fillstyle="none", ms=9)
            axis.annotate(
                said, (point.retained, own), textcoords="offset points", xytext=(8, -10), fontsize=8
            )
            if point.flops is not None:
                axis.plot(point.retained, 100 * point.flops, "x", color="black", ms=8)
        axis.plot([], [], "o", color="#e07b26", fillstyle="none", label="published settings, predicted")
        if any(point.flops for point in PUBLISHED if point.decoder == decoder):
            axis.plot([], [], "x", color="black", label="published settings, published FLOPs")
        axis.set_title(decoder, fontsize=10)
        axis.set_xlabel("retained tokens N_r")
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("prefill FLOPs, % of full tokens (tower included)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _predicted(decoder: str, retained: int, skipped: int, tokens: int) -> float:
    cost = predict_cost(
        llava_with(decoder),
        SkipConfig(retained=retained, skipped=skipped),
        text_tokens=_TEXT,
        new_tokens=1,
        visual_tokens=tokens,
    )
    return cost.ratio_to_full.prefill_flops


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    return plt
