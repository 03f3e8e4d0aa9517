"""The error that skipping the FFN makes: bounded, and measured (docs/analysis.md has the mathematics).

Skip-FFN leaves out the update u of layer l for the skipped tokens. So behind the layer, where e is the error
before it and f the layer as it is when it skips,

    e' = f(h + e) − f(h) − u        ‖e'‖ ≤ Lip(f) ‖e‖ + ‖u‖

`worst_case` takes Lip(f) from the layer's weights and the size of what it multiplies; `local` from Jacobians,
and follows each u alone through the layers behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from typing import Any

from torch import nn

from skipvision.analysis.lipschitz import Parts
from skipvision.analysis.local import local_bounds
from skipvision.analysis.runs import run_twice
from skipvision.analysis.worst_case import worst_case as bound_worst_case
from skipvision.anatomy.families import dissect
from skipvision.config import SkipConfig
from skipvision.errors import InputError


@dataclass(frozen=True)
class Errors:
    """‖h̃ − h‖ / ‖h‖ over all tokens of a prompt at one place of the decoder; from 2 on, nothing is said.

    Attributes:
        measured: h̃ with Skip-FFN, h with full tokens.
        local: bound from the product of the layers' Jacobian norms.
        worst: bound from spectral norms; None if it was not asked for.
    """

    measured: float
    local: float
    worst: float | None


@dataclass(frozen=True)
class LayerErrors(Errors):
    """Behind one layer.

    Attributes:
        omitted: ‖u‖ / ‖h‖, the update that the layer's skipped tokens go without.
        moved: how far it alone moves the decoder's output, through later layers as they skip; relative.
        jacobian: largest norm of the layer's Jacobian that was found.
        attention: Lipschitz constant of attention and its norm, in the largest error over tokens; or None.
        ffn: of the FFN and its norm; or None.
    """

    omitted: float
    moved: float
    jacobian: float
    attention: float | None
    ffn: float | None


@dataclass(frozen=True)
class OutputErrors(Errors):
    """Behind the decoder's last norm.

    Attributes:
        composite: bound from the Jacobians of all layers behind each omitted update together.
        summed: bound from what each omitted update alone does to the output; the sum of ``moved``.
    """

    composite: float
    summed: float


@dataclass(frozen=True)
class ErrorBound:
    """Of one prompt.

    Attributes:
        layers: in order.
        output: behind the decoder's last norm.
        tokens: of the prompt.
        skipped: of these, the ones that bypass the FFN.
    """

    layers: tuple[LayerErrors, ...]
    output: OutputErrors
    tokens: int
    skipped: int


def error_bound(
    model: nn.Module, inputs: Mapping[str, Any], config: SkipConfig, *, worst_case: bool = True
) -> ErrorBound:
    """Bound and measure what Skip-FFN alone changes: the same tokens, none merged, summarised or forgotten.

    Args:
        model: in eval mode; with LoRA, its weights are taken together. Skip-Vision may be attached.
        inputs: one prompt with an image, without padding, on the model's device.
        config: says which tokens are retained; all other visual tokens are skipped.
        worst_case: bound it from spectral norms too, which takes layers of a kind that is known.

    Raises:
        UnsupportedModelError: the model's layers, or what is between them, are not of a kind that is known.
        InputError: there is more than one row, padding, or no image; or the model is in training mode.
    """
    if model.training:
        raise InputError("the model is in training mode, in which runs differ by dropout: call model.eval()")
    layers = dissect(model).layers
    parts = [Parts.of(layer, number) for number, layer in enumerate(layers)] if worst_case else []
    watched = [module for part in parts for module in part.watched]
    with run_twice(model, inputs, config, watched) as pair:
        worst = bound_worst_case(pair, parts) if worst_case else None
        local = local_bounds(pair)
    found, length = [], float(pair.full.output.norm())
    for number, (full, bypass) in enumerate(zip(pair.full.hidden[1:], pair.bypass.hidden[1:], strict=True)):
        size = float(full.norm())
        found.append(
            LayerErrors(
                measured=float((bypass - full).norm()) / size,
                local=local.errors[number] / size,
                worst=None if worst is None else worst.errors[number] / size,
                omitted=local.omitted[number] / size,
                moved=local.moved[number] / length,
                jacobian=local.jacobians[number],
                attention=None if worst is None else worst.attention[number],
                ffn=None if worst is None else worst.ffn[number],
            )
        )
    output = OutputErrors(
        measured=float((pair.bypass.output - pair.full.output).norm()) / length,
        local=local.output / length,
        worst=None if worst is None else worst.output / length,
        composite=local.composite / length,
        summed=fsum(local.moved) / length,
    )
    return ErrorBound(tuple(found), output, pair.skipped.numel(), int(pair.skipped.sum()))
