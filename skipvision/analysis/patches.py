"""The fate of each visual token of each image under a plan."""

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
        fate: whether it is retained, skipped, merged or dropped.
        into: index in the same image of the token that it is merged into; else None.
        box: the pixels that it covers; None for a mark without pixels.
    """

    fate: Fate
    into: int | None
    box: Box | None


def fates(
    plan: TokenPlan, visual: torch.Tensor, counts: Sequence[int]
) -> list[list[tuple[Fate, int | None]]]:
    """Return, for each image, the fate of each visual token and the index of the token it is merged into.

    Args:
        plan: plan of the batch.
        visual: (B, T) True for visual tokens.
        counts: number of visual tokens of each image, in order; their sum is that of ``visual``.
    """
    length = visual.shape[1]
    into = plan.merged_into
    host = torch.take_along_dim(plan.source, into.clamp(min=0), dim=1)
    role = torch.take_along_dim(plan.roles.long(), into.clamp(min=0), dim=1)
    row, column = visual.nonzero(as_tuple=True)
    found = zip(
        (row * length + column).tolist(),
        (row * length + host[row, column]).tolist(),
        into[row, column].tolist(),
        role[row, column].tolist(),
        strict=True,
    )
    images: list[list[tuple[Fate, int | None]]] = []
    for count in counts:
        tokens = [next(found) for _ in range(count)]
        number = {at: index for index, (at, *_) in enumerate(tokens)}
        images.append([_fate(*token, number) for token in tokens])
    return images


def _fate(at: int, host: int, into: int, role: int, number: dict[int, int]) -> tuple[Fate, int | None]:
    if into < 0:
        return "dropped", None
    if host != at:
        return "merged", number[host]
    return ("skipped" if role == TokenRole.SKIPPED else "retained"), None
