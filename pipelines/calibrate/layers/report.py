"""The report of a search for layers: a Markdown table and a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.evaluation.figures import FULL_COLOUR, SKIP_COLOUR, hide_box, save, subplots
from pipelines.evaluation.tables import markdown_table

_HEADER = [
    *(
        "rows",
        "round",
        "",
        "move",
        "FFN skipped in layers",
        "dropped after",
        "prefill FLOPs, %",
        "KV bytes, %",
    ),
    *("divergence, nats", "same next token, %"),
]


def markdown(evidence: Mapping[str, Any]) -> str:
    """Format the path and the verification. The other options of each round are only drawn."""
    rows = [_line(one) for one in evidence["history"] if one["stage"] != "option"]
    table = markdown_table(_HEADER, rows, left=range(len(_HEADER)))
    chosen = ", ".join(f"{name} {value}" for name, value in evidence["chosen"].items())
    return (
        f"{table}\n\nCosts are relative to full tokens. The divergence of the next-token predictions from "
        "those with full tokens is the mean over rows, ± its standard error. evidence.json has the moves "
        "that were not chosen too.\n\n"
        f"Chosen: {chosen}.\n"
    )


def _line(one: Mapping[str, Any]) -> list[str]:
    skip, error = one["skip"], one["standard_error"]
    spread = "" if error is None else f" ± {error:.4f}"
    return [
        f"{one['part']} ({one['rows']})",
        str(one["round"] or ""),
        one["stage"],
        one["move"],
        str(skip["skip_layers"]) if skip["skip_ffn"] else "none",
        "never" if skip["drop_after"] is None else str(skip["drop_after"]),
        *(f"{100 * one['costs'][name]:.1f}" for name in ("prefill_flops", "kv_bytes")),
        f"{one['divergence']:.4f}{spread}",
        f"{100 * one['agreement']:.1f}",
    ]


def figure(evidence: Mapping[str, Any], budget: float, path: Path) -> None:
    """Draw the divergence of every measured config against its prefill FLOPs, with the greedy path."""
    figure, axis = subplots(size=(7, 4.5))
    lines = [one for one in evidence["history"] if one["part"] == "search"]

    def points(*stages: str) -> tuple[list[float], list[float]]:
        some = [one for one in lines if one["stage"] in stages]
        return [100 * one["costs"]["prefill_flops"] for one in some], [one["divergence"] for one in some]

    axis.plot(*points("option"), "o", color=FULL_COLOUR, alpha=0.4, label="measured")
    axis.plot(*points("start", "chosen"), "D-", color=SKIP_COLOUR, label="greedy path")
    axis.plot(*points("compared"), "s", color=FULL_COLOUR, label="skip in every layer")
    axis.axvline(100 * budget, color="#b3261e", linewidth=1)
    axis.set_xlabel("prefill FLOPs, % of full tokens")
    axis.set_ylabel("divergence from full tokens, nats")
    axis.legend(frameon=False)
    hide_box(axis)
    save(figure, path)
