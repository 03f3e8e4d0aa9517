"""The error of skipping the FFN, bounded where the two runs are: from Jacobians, and by what omissions do.

Mean values along the straight way between two points are taken for their largest at both ends and halfway:
so these are bounds as far as Jacobians change no more than that on the way, which is not proven.
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
    """What Jacobians say.

    Attributes:
        errors: bound of ‖e‖, over all tokens, behind each layer: the product of the layers' Jacobian norms.
        output: the same behind the decoder's last norm.
        composite: bound of ‖e‖ there from the Jacobians of all later layers together.
        omitted: ‖u‖ of each layer.
        jacobians: norm of each layer's Jacobian.
        moved: how far each layer's omitted update alone moves the output.
    """

    errors: list[float]
    output: float
    composite: float
    omitted: list[float]
    jacobians: list[float]
    moved: list[float]


def local_bounds(pair: Pair) -> Local:
    """Propagate the updates that skipped tokens go without through the layers behind."""
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
        composite=fsum(most for _, most in carried),
        omitted=[float(update.norm()) for update in updates],
        jacobians=jacobians,
        moved=[moved for moved, _ in carried],
    )


def _carried(pair: Pair, number: int, update: torch.Tensor) -> tuple[float, float]:
    """How far a layer's omitted update moves the output, through all later layers as they skip; and could.

    With G these layers and H the full run, the two outputs differ by the sum over layers of
    G(H − u) − G(H), no more and no less. Only skipped tokens have a u, so only their error enters.
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
    """Both ends and the middle; one point where they are one."""
    return [one] if torch.equal(one, other) else [one, (one + other) / 2, other]
