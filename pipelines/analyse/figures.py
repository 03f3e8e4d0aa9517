"""Figures of FFN ratios, errors and error bounds, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.evaluation.figures import FULL_COLOUR, SKIP_COLOUR, hide_box, save, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {"visual": SKIP_COLOUR, "text": FULL_COLOUR}
_ERRORS = {
    "worst": ("bound from spectral norms", "#9aa5b1", "--"),
    "local": ("bound from Jacobians, layer by layer", FULL_COLOUR, "-."),
    "measured": ("measured", SKIP_COLOUR, "-"),
}
_AT_OUTPUT = {
    "composite": ("bound from Jacobians of all later layers", "#2f6f8f", "*"),
    "summed": ("bound: each omission's effect, added up", "#2f8f5b", "D"),
}


def draw_ratios(variants: Mapping[str, Any], path: Path) -> None:
    """Draw the mean ratio over layers, with bands for half and nine tenths of the tokens, per variant."""
    figure, panels = _panels(len(variants))
    for axis, (name, variant) in zip(panels, variants.items(), strict=True):
        for kind, colour in _KINDS.items():
            spread = variant["ratios"][kind]
            layers = range(len(spread["mean"]))
            for low, high, opacity in ((0, 4, 0.15), (1, 3, 0.25)):
                lower, upper = ([layer[at] for layer in spread["quantiles"]] for at in (low, high))
                axis.fill_between(layers, lower, upper, color=colour, alpha=opacity, linewidth=0)
            axis.plot(layers, spread["mean"], color=colour, marker="o", label=f"{kind} tokens")
        axis.set_yscale("log")
        _dress(axis, name, len(layers), "‖FFN‖ / ‖h‖")
    panels[0].legend(frameon=False)
    save(figure, path)


def draw_ratio_heat(variants: Mapping[str, Any], path: Path) -> None:
    """Draw histograms of the ratios as heat maps over layers: visual above text, a column per variant."""
    figure, grid = subplots(2, len(variants), size=(4.6 * len(variants) + 1, 6), squeeze=False, sharex=True)
    for column, (name, variant) in enumerate(variants.items()):
        edges = variant["ratios"]["edges"]
        for row, kind in enumerate(_KINDS):
            axis, histogram = grid[row][column], variant["ratios"][kind]["histogram"]
            bounds = [layer - 0.5 for layer in range(len(histogram) + 1)]
            mesh = axis.pcolormesh(bounds, edges, list(zip(*histogram, strict=True)), cmap="magma_r")
            axis.set_yscale("log")
            _dress(axis, f"{name}, {kind} tokens", len(histogram), "‖FFN‖ / ‖h‖")
            figure.colorbar(mesh, ax=axis, label="share of tokens")
    save(figure, path)


def draw_errors(errors: Mapping[str, Sequence[Mapping[str, float | None]]], path: Path) -> None:
    """Draw the measured error and its bounds over layers, the output last, in a panel per variant."""
    figure, panels = _panels(len(errors))
    for axis, (name, layers) in zip(panels, errors.items(), strict=True):
        for kind, (label, colour, style) in _ERRORS.items():
            values = [value for layer in layers if (value := layer[kind]) is not None]
            if len(values) == len(layers):
                axis.plot(range(len(values)), values, style, color=colour, marker="o", label=label)
        for kind, (label, colour, style) in _AT_OUTPUT.items():
            at_output: Any = layers[-1][kind]
            axis.plot(len(layers) - 1, at_output, style, color=colour, markersize=9, label=label)
        axis.axhline(2, color="#c9d1db", linewidth=1, zorder=0)
        axis.set_yscale("log")
        _dress(axis, name, len(layers), "error / ‖h‖")
        axis.set_xticks([*axis.get_xticks()[:-1], len(layers) - 1])
        axis.set_xticklabels([f"{int(tick)}" for tick in axis.get_xticks()[:-1]] + ["output"])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    figure, grid = subplots(1, count, size=(4.6 * count + 1, 3.8), squeeze=False, sharey=True)
    return figure, grid[0]


def _dress(axis: Axes, title: str, layers: int, unit: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("layer")
    axis.set_ylabel(unit)
    axis.set_xticks(range(0, layers, max(1, layers // 8)))
    hide_box(axis)
