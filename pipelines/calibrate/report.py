"""The report of a calibration: a Markdown table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.calibrate.config import LimitsSection
from pipelines.evaluation.figures import FULL_COLOUR, SKIP_COLOUR, hide_box, save, subplots
from pipelines.evaluation.tables import markdown_table

_COSTS = {"prefill_flops": "prefill FLOPs", "kv_bytes": "KV bytes", "latency": "time to first token"}


def markdown(evidence: Mapping[str, Any], budget: LimitsSection) -> str:
    """Format the stages of the search, the verification and the decision."""
    first = evidence["history"][0]
    fields, costs = list(first["values"]), [name for name in _COSTS if name in first["costs"]]
    interval = f"difference [{100 * budget.confidence:g} %]"
    header = ["stage", *fields, *(f"{_COSTS[name]}, %" for name in costs), "items", interval, "out because"]
    rows = []
    for one in evidence["history"]:
        points = "" if one["difference"] is None else _points(one)
        ratios = (f"{100 * one['costs'][name]:.1f}" for name in costs)
        values = (str(value) for value in one["values"].values())
        rows.append([one["stage"], *values, *ratios, str(one["items"]), points, one["out"]])
    full = evidence["history"][-1]["full"]
    score = "" if full is None else f" ({100 * full:.1f} % on the held-out rows)"
    table = markdown_table(header, rows, left=range(len(header)))
    return f"{table}\n\nCosts and differences are relative to full tokens{score}.\n\n{_decision(evidence)}\n"


def _points(one: Mapping[str, Any]) -> str:
    difference, low, high = (100 * one[key] + 0.0 for key in ("difference", "low", "high"))
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def _decision(evidence: Mapping[str, Any]) -> str:
    if evidence["chosen"] is None:
        return f"Nothing was chosen: {evidence['reason']}."
    return "Chosen: " + ", ".join(f"{name} {value}" for name, value in evidence["chosen"].items()) + "."


def figure(evidence: Mapping[str, Any], budget: LimitsSection, path: Path) -> None:
    """Draw the difference of every evaluated config against its cost, by stage."""
    figure, axis = subplots(size=(7, 4.5))
    scored = [one for one in evidence["history"] if one["difference"] is not None]
    stages = list(dict.fromkeys(one["stage"] for one in scored))
    for number, stage in enumerate(stages, start=1):
        members = [one for one in scored if one["stage"] == stage]
        middle = [100 * one["difference"] for one in members]
        last = stage == stages[-1]
        axis.errorbar(
            [100 * one["costs"][budget.minimise] for one in members],
            middle,
            yerr=[
                [m - 100 * one["low"] for m, one in zip(middle, members, strict=True)],
                [100 * one["high"] - m for m, one in zip(middle, members, strict=True)],
            ],
            fmt="D" if last else "o",
            color=SKIP_COLOUR if last else FULL_COLOUR,
            alpha=1.0 if last else number / (len(stages) + 1),
            label=stage,
        )
    if budget.accuracy_drop is not None:
        axis.axhline(-100 * budget.accuracy_drop, color="#b3261e", linewidth=1)
    axis.axhline(0, color=FULL_COLOUR, linewidth=0.5)
    axis.set_xlabel(f"{_COSTS[budget.minimise]}, % of full tokens")
    axis.set_ylabel("accuracy − full tokens, points")
    if scored:
        axis.legend(frameon=False)
    hide_box(axis)
    save(figure, path)
