"""What a plan does with each visual token of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from skipvision.analysis.geometry import Box
from skipvision.plan import TokenPlan, TokenRole

Fate = Literal["retained", "skipped", "merged", "dropped"]


@dataclass(frozen=True)
class Patch:
    """One visual token of an image.

    Attributes:
        fate: what becomes of it.
        into: where it is merged, number of the token of the same image it ends in; else None.
        box: the pixels it was made from; None for a mark that stands for no pixels.
    """

    fate: Fate
    into: int | None
    box: Box | None


def fates(
    plan: TokenPlan, visual: torch.Tensor, counts: Sequence[int]
) -> list[list[tuple[Fate, int | None]]]:
    """What becomes of each visual token, and the token of its image that it is merged into.

    Args:
        plan: of the batch.
        visual: (B, T) True where a visual token stands.
        counts: visual tokens of each image, in order; together as many as are True.
    """
    length = visual.shape[1]
    into = plan.merged_into
    stands = torch.take_along_dim(plan.source, into.clamp(min=0), dim=1)
    role = torch.take_along_dim(plan.roles.long(), into.clamp(min=0), dim=1)
    row, place = visual.nonzero(as_tuple=True)
    found = zip(
        (row * length + place).tolist(),
        (row * length + stands[row, place]).tolist(),
        into[row, place].tolist(),
        role[row, place].tolist(),
        strict=True,
    )
    images: list[list[tuple[Fate, int | None]]] = []
    for count in counts:
        tokens = [next(found) for _ in range(count)]
        number = {at: index for index, (at, *_) in enumerate(tokens)}
        images.append([_fate(*token, number) for token in tokens])
    return images


def _fate(at: int, stands: int, into: int, role: int, number: dict[int, int]) -> tuple[Fate, int | None]:
    if into < 0:
        return "dropped", None
    if stands != at:
        return "merged", number[stands]
    return ("skipped" if role == TokenRole.SKIPPED else "retained"), None
