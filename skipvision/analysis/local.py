"""The local bound of the error of skipping the FFN: from Jacobians at the two runs that are compared.

The mean value theorem needs the largest Jacobian norm on the line between two points. It is evaluated at both
ends and in the middle, so the result is a bound if no norm in between is larger, which is not proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import torch

from skipvision.analysis.runs import Pair
from skipvision.analysis.spectral import jacobian_norm


@dataclass(frozen=True)
class Local:
    """Errors, bounds and Jacobian norms, all absolute.

    Attributes:
        errors: bound of ‖e‖ over all tokens after each layer, from the product of the Jacobian norms.
        output: the same bound after the decoder's last norm.
        composite: bound of ‖e‖ after the last norm, from the Jacobian of all later layers taken together.
        omitted: ‖u‖ of each layer.
        jacobians: norm of each layer's Jacobian.
        moved: change of the output by each layer's omitted update alone.
    """

    errors: list[float]
    output: float
    composite: float
    omitted: list[float]
    jacobians: list[float]
    moved: list[float]


def local_bounds(pair: Pair) -> Local:
    """Propagate the omitted updates of skipped tokens through the later layers."""
    full, bypass = pair.full.hidden, pair.bypass.hidden
    with torch.no_grad():
        updates = [after - layer(h) for h, after, layer in zip(full, full[1:], pair.layers, strict=False)]
    error, errors, jacobians = 0.0, [], []
    for number, (layer, update) in enumerate(zip(pair.layers, updates, strict=True)):
        points = _between(full[number], bypass[number])
        jacobians.append(max(jacobian_norm(layer, point) for point in points))
        error = jacobians[-1] * error + float(update.norm())
        errors.append(error)
    last = max(jacobian_norm(pair.final_norm, point) for point in _between(full[-1], bypass[-1]))
    carried = [_carried(pair, number, update) for number, update in enumerate(updates)]
    return Local(
        errors=errors,
        output=last * error,
        composite=fsum(bound for _, bound in carried),
        omitted=[float(update.norm()) for update in updates],
        jacobians=jacobians,
        moved=[moved for moved, _ in carried],
    )


def _carried(pair: Pair, number: int, update: torch.Tensor) -> tuple[float, float]:
    """Return the change of the output by a layer's omitted update, and its bound.

    With G the later layers with Skip-FFN and H the full run, the difference of the two outputs is exactly the
    sum over layers of G(H − u) − G(H). Only skipped tokens have a u, so only their error enters.
    """
    if not bool(update.any()):
        return 0.0, 0.0
    start, skipped = pair.full.hidden[number + 1], pair.skipped[:, None].to(update.dtype)

    def to_output(error: torch.Tensor) -> torch.Tensor:
        hidden = start + error * skipped
        for layer in pair.layers[number + 1 :]:
            hidden = layer(hidden)
        return pair.final_norm(hidden)

    points = _between(torch.zeros_like(update), -update)
    with torch.no_grad():
        moved = float((to_output(points[-1]) - to_output(points[0])).norm())
    return moved, max(jacobian_norm(to_output, point) for point in points) * float(update.norm())


def _between(one: torch.Tensor, other: torch.Tensor) -> Sequence[torch.Tensor]:
    """Both ends and the middle, or a single point if the ends are equal."""
    return [one] if torch.equal(one, other) else [one, (one + other) / 2, other]
