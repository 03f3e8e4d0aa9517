"""Position ids of a reduced sequence, on one axis or on several, as M-RoPE has.

Families pass their decoders (B, T), (1, T), or (A, B, T) with A axes; (…, B, T) below is any of these. M-RoPE
has three axes, which a fourth may precede that counts text.
"""

from __future__ import annotations

import torch

from skipvision.plan import TokenPlan


def of_caller(position_ids: torch.Tensor | None, mask: torch.Tensor, offset: int) -> torch.Tensor:
    """(…, B, T) position ids of the caller's sequence, as given or as a decoder would number them."""
    rows, length = mask.shape
    if position_ids is None:
        position_ids = torch.arange(offset, offset + length, device=mask.device)[None]
    return position_ids.expand(*position_ids.shape[:-2], rows, length)


def of_reduced(callers: torch.Tensor, plan: TokenPlan, mask: torch.Tensor, *, original: bool) -> torch.Tensor:
    """(…, B, L) position ids of the reduced sequence; arbitrary at padding.

    Args:
        callers: (…, B, T) the caller's, from `of_caller`.
        plan: the reduction.
        mask: (B, T) the caller's real tokens.
        original: tokens keep their position ids; otherwise they count on from the first of their row.
    """
    index = plan.position_source if original else mask.to(torch.uint8).argmax(dim=1, keepdim=True)
    index = index.clamp(min=0).expand(*callers.shape[:-2], -1, -1)
    taken = torch.take_along_dim(callers, index, dim=-1)
    return taken if original else (taken + plan.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def ends(positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(A, B) next position on each axis; on M-RoPE's three axes, the position after the last of all three."""
    following = positions.reshape(-1, *mask.shape).masked_fill(~mask, -1).amax(dim=2) + 1
    return torch.cat([following[:-3], following[-3:].amax(dim=0).expand_as(following[-3:])])


def of_axes(values: torch.Tensor, axes: int) -> torch.Tensor:
    """(A, B) values for another number of axes: with or without the one that may precede M-RoPE's three."""
    return values[[max(len(values) - axes + axis, 0) for axis in range(axes)]]
