"""The report of an analysis: numbers, a table and three figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median
from typing import Any

from pipelines.analyse.figures import draw_errors, draw_ratio_heat, draw_ratios
from pipelines.analyse.folder import AnalysisFolder
from pipelines.evaluation.tables import markdown_table
from pipelines.shared.console import say
from pipelines.shared.files import write_text

ERRORS = {
    "moved": "output moved by this omission",
    "measured": "error, measured",
    "summed": "bound, omissions added up",
    "composite": "bound, later layers together",
    "local": "bound, layer by layer",
    "worst": "bound, worst case",
}
"""The errors reported for each layer and for the output, with their labels in the table."""


def write_report(result: Mapping[str, Any], folder: AnalysisFolder) -> None:
    """Write all numbers, the table and the figures, and print the table."""
    variants = result["variants"]
    write_text(folder.numbers, json.dumps(result, indent=1) + "\n")
    write_text(folder.table, markdown(variants))
    ratios, heat, errors = folder.figures
    draw_ratios(variants, ratios)
    draw_ratio_heat(variants, heat)
    draw_errors({name: medians(variant) for name, variant in variants.items()}, errors)
    names = ", ".join(file.name for file in (folder.numbers, folder.table, *folder.figures))
    say(f"\n{folder.table.read_text()}\nin {folder.path}: {names}")


def medians(variant: Mapping[str, Any]) -> list[dict[str, float | None]]:
    """Return the errors after each layer and, last, at the output, as medians over prompts."""
    layers = zip(*([*prompt["layers"], prompt["output"]] for prompt in variant["bounds"]), strict=True)
    return [
        {
            name: None if prompts[0][name] is None else median(prompt[name] for prompt in prompts)
            for name in ERRORS
            if name in prompts[0]
        }
        for prompts in layers
    ]


def markdown(variants: Mapping[str, Any]) -> str:
    """Return one table per variant, with a row for each layer and one for the output."""
    blocks = []
    for name, variant in variants.items():
        header = [name, "FFN ratio, visual", "FFN ratio, text", *ERRORS.values()]
        lines = []
        ratios, errors = variant["ratios"], medians(variant)
        for number, error in enumerate(errors):
            at_end = number == len(errors) - 1
            means = ["", ""] if at_end else [f"{ratios[k]['mean'][number]:.3f}" for k in ("visual", "text")]
            values = ["" if error.get(key) is None else f"{error[key]:.3g}" for key in ERRORS]
            lines.append(["output" if at_end else f"layer {number}", *means, *values])
        blocks.append(markdown_table(header, lines) + "\n")
    return "\n".join(blocks)
