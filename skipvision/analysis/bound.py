"""The error that skipping the FFN makes: bounded, and measured (docs/analysis.md has the mathematics).

Skip-FFN leaves out the update u of layer l for the skipped tokens. So behind the layer, where e is the error
before it and f the layer as it is when it skips,

    e' = f(h + e) − f(h) − u        ‖e'‖ ≤ Lip(f) ‖e‖ + ‖u‖

`worst` takes Lip(f) from the layer's weights and the size of what it multiplies; it holds whatever e is.
`local` takes the largest of the norms of f's Jacobian at h, at h + e and halfway, and holds to first order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipvision.analysis.lipschitz import AttentionBound, Normed, Parts, ffn_constant
from skipvision.analysis.runs import Pair, run_twice
from skipvision.analysis.spectral import jacobian_norm
from skipvision.config import SkipConfig
from skipvision.errors import InputError, UnsupportedModelError
from skipvision.families import dissect

_CLOSE = 1e-2


@dataclass(frozen=True)
class Errors:
    """‖h̃ − h‖ / ‖h‖ over all tokens of a prompt at one place of the decoder; from 2 on, nothing is said.

    Attributes:
        measured: h̃ with Skip-FFN, h with full tokens.
        local: bound from Jacobians.
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
        jacobian: largest norm of the layer's Jacobian at the three points.
        attention: Lipschitz constant of attention and its norm, in the largest error over tokens; or None.
        ffn: of the FFN and its norm; or None.
    """

    omitted: float
    jacobian: float
    attention: float | None
    ffn: float | None


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
    output: Errors
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
        worst = _worst_case(pair, parts) if worst_case else None
        return _together(pair, worst)


# ------------------------------------------------------------------------------------- from Jacobians


def _together(pair: Pair, worst: _WorstCase | None) -> ErrorBound:
    full, bypass = pair.full, pair.bypass
    error, found = 0.0, []
    for number, layer in enumerate(pair.layers):
        before, after = full.hidden[number], full.hidden[number + 1]
        with torch.no_grad():
            omitted = float((after - layer(before)).norm())
        growth = max(jacobian_norm(layer, point) for point in _between(before, bypass.hidden[number]))
        error = growth * error + omitted
        size = float(after.norm())
        found.append(
            LayerErrors(
                measured=float((bypass.hidden[number + 1] - after).norm()) / size,
                local=error / size,
                worst=None if worst is None else worst.errors[number] / size,
                omitted=omitted / size,
                jacobian=growth,
                attention=None if worst is None else worst.attention[number],
                ffn=None if worst is None else worst.ffn[number],
            )
        )
    points = _between(full.hidden[-1], bypass.hidden[-1])
    growth = max(jacobian_norm(pair.final_norm, point) for point in points)
    size = float(full.output.norm())
    output = Errors(
        measured=float((bypass.output - full.output).norm()) / size,
        local=growth * error / size,
        worst=None if worst is None else worst.output / size,
    )
    return ErrorBound(tuple(found), output, pair.skipped.numel(), int(pair.skipped.sum()))


def _between(one: torch.Tensor, other: torch.Tensor) -> Sequence[torch.Tensor]:
    """Both ends and the middle; one point where they are one."""
    return [one] if torch.equal(one, other) else [one, (one + other) / 2, other]


# --------------------------------------------------------------------------------- from spectral norms


@dataclass(frozen=True)
class _WorstCase:
    """Norms of errors over all tokens behind each layer and at the output, and each layer's constants."""

    errors: list[float]
    output: float
    attention: list[float]
    ffn: list[float]


@torch.no_grad()
def _worst_case(pair: Pair, parts: Sequence[Parts]) -> _WorstCase:
    runs = pair.full, pair.bypass
    error = torch.zeros_like(pair.full.hidden[0][0, :, 0], dtype=torch.double)
    errors, attention, ffn = [], [], []
    for number, part in enumerate(parts):
        before = [run.hidden[number] for run in runs]
        middle = [run.hidden[number] + run.seen[part.layer.attention] for run in runs]
        update = [run.seen[part.layer.mlp] for run in runs]
        _check_sum(pair, number, middle, update)
        norms = Normed(part.norms[0], *before), Normed(part.norms[1], *middle)
        attend = AttentionBound(part, norms[0], runs)
        feed = ffn_constant(part, norms[1], runs)
        error = error + attend.grown(norms[0].grown(error))
        omitted = update[0][0].double().norm(dim=-1)
        error = error + torch.where(pair.skipped, omitted, feed * norms[1].grown(error))
        errors.append(float(error.norm()))
        attention.append(attend.constant() * float(norms[0].factor.max()))
        ffn.append(feed * float(norms[1].factor.max()))
    last = Normed(pair.final_norm, *(run.hidden[-1] for run in runs))
    output = float(last.scale.abs().max()) * float(last.grown(error).norm())
    return _WorstCase(errors, output, attention, ffn)


def _check_sum(
    pair: Pair, number: int, middle: Sequence[torch.Tensor], update: Sequence[torch.Tensor]
) -> None:
    """Raise `UnsupportedModelError` unless a layer adds attention's output, and then the FFN's, as they are."""
    for run, halfway, added in zip((pair.full, pair.bypass), middle, update, strict=True):
        after = run.hidden[number + 1]
        if float((halfway + added - after).norm()) > _CLOSE * float(after.norm()):
            raise UnsupportedModelError(
                f"layer {number} is not h + attention + FFN: what it does to what they return is not known; "
                "worst_case=False leaves the bound from spectral norms out",
                "layers that are not a sum of their halves",
            )
