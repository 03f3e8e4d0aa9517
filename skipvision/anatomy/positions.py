"""Position ids of a reduced sequence: on one axis, or on each of M-RoPE's three behind which text may count.

(…, B, T) is what families hand to their decoders: (B, T), (1, T), or (A, B, T) with A axes.
"""

from __future__ import annotations

import torch

from skipvision.plan import TokenPlan


def of_caller(position_ids: torch.Tensor | None, mask: torch.Tensor, offset: int) -> torch.Tensor:
    """(…, B, T) position ids of the caller's sequence, as given or as a decoder makes them."""
    rows, length = mask.shape
    if position_ids is None:
        position_ids = torch.arange(offset, offset + length, device=mask.device)[None]
    return position_ids.expand(*position_ids.shape[:-2], rows, length)


def of_reduced(callers: torch.Tensor, plan: TokenPlan, mask: torch.Tensor, *, original: bool) -> torch.Tensor:
    """(…, B, L) position ids of the reduced sequence; arbitrary at padding.

    Args:
        callers: (…, B, T) the caller's, as `of_caller` gives them.
        plan: the reduction.
        mask: (B, T) the caller's real tokens.
        original: tokens keep their position ids, instead of counting on from their row's first.
    """
    index = plan.position_source if original else mask.to(torch.uint8).argmax(dim=1, keepdim=True)
    index = index.clamp(min=0).expand(*callers.shape[:-2], -1, -1)
    taken = torch.take_along_dim(callers, index, dim=-1)
    return taken if original else (taken + plan.attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def ends(positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(A, B) position behind the last one of each axis; M-RoPE goes on behind its three axes' last."""
    behind = positions.reshape(-1, *mask.shape).masked_fill(~mask, -1).amax(dim=2) + 1
    return torch.cat([behind[:-3], behind[-3:].amax(dim=0).expand_as(behind[-3:])])


def of_axes(values: torch.Tensor, axes: int) -> torch.Tensor:
    """(A, B) values for another number of axes: M-RoPE has three, behind one that counts tokens or not."""
    return values[[max(len(values) - axes + axis, 0) for axis in range(axes)]]
