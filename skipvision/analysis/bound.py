"""Bound and measure the error of skipping the FFN (docs/analysis.md has the mathematics).

Skip-FFN omits the update u of a layer for the skipped tokens. With the error e before the layer, and f the
layer with Skip-FFN, the error after it is

    e' = f(h + e) − f(h) − u        ‖e'‖ ≤ Lip(f) ‖e‖ + ‖u‖

`worst_case` takes Lip(f) from the layer's weights and from the size of its activations. `local` takes it from
Jacobians, and also follows each u separately through all later layers.
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
    """‖h̃ − h‖ / ‖h‖ over all tokens of a prompt at one point of the decoder. A bound above 2 is vacuous.

    Attributes:
        measured: with h̃ from Skip-FFN and h from full tokens.
        local: bound from the product of the layers' Jacobian norms.
        worst: bound from spectral norms; None without ``worst_case``.
    """

    measured: float
    local: float
    worst: float | None


@dataclass(frozen=True)
class LayerErrors(Errors):
    """Errors after one layer.

    Attributes:
        omitted: ‖u‖ / ‖h‖, the size of the update that the layer's skipped tokens miss.
        moved: relative change of the decoder's output by this omission alone, through later layers with
            Skip-FFN.
        jacobian: largest measured norm of the layer's Jacobian.
        attention: Lipschitz constant of attention with its norm layer, in the maximum norm over tokens; or
            None.
        ffn: Lipschitz constant of the FFN with its norm layer; or None.
    """

    omitted: float
    moved: float
    jacobian: float
    attention: float | None
    ffn: float | None


@dataclass(frozen=True)
class OutputErrors(Errors):
    """Errors after the decoder's last norm.

    Attributes:
        composite: bound from the Jacobian of all layers after each omitted update, taken together.
        summed: bound from the effect of each omitted update alone: the sum of ``moved``.
    """

    composite: float
    summed: float


@dataclass(frozen=True)
class ErrorBound:
    """Errors of skipping the FFN for one prompt.

    Attributes:
        layers: errors after each layer, in order.
        output: errors after the decoder's last norm.
        tokens: number of tokens of the prompt.
        skipped: number of tokens that bypass the FFN.
    """

    layers: tuple[LayerErrors, ...]
    output: OutputErrors
    tokens: int
    skipped: int


def error_bound(
    model: nn.Module, inputs: Mapping[str, Any], config: SkipConfig, *, worst_case: bool = True
) -> ErrorBound:
    """Bound and measure the effect of Skip-FFN alone: no token is merged, summarised or uncached.

    Args:
        model: in eval mode. LoRA weights count as merged. Skip-Vision may be attached.
        inputs: one prompt with an image, without padding, on the model's device.
        config: decides which tokens are retained; all other visual tokens are skipped.
        worst_case: also compute the bound from spectral norms, which supports fewer kinds of layers.

    Raises:
        UnsupportedModelError: the model's layers, or operations between them, are of an unsupported kind.
        InputError: the inputs have several rows, padding, or no image; or the model is in training mode.
    """
    if model.training:
        raise InputError("the model is in training mode, where dropout makes runs differ: call model.eval()")
    layers = dissect(model).layers
    parts = [Parts.of(layer, number) for number, layer in enumerate(layers)] if worst_case else []
    watched = [module for part in parts for module in part.watched]
    with run_twice(model, inputs, config, watched) as pair:
        worst = bound_worst_case(pair, parts) if worst_case else None
        local = local_bounds(pair)
    errors, length = [], float(pair.full.output.norm())
    for number, (full, bypass) in enumerate(zip(pair.full.hidden[1:], pair.bypass.hidden[1:], strict=True)):
        size = float(full.norm())
        errors.append(
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
    return ErrorBound(tuple(errors), output, pair.skipped.numel(), int(pair.skipped.sum()))
