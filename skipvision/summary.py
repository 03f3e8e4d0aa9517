"""Summary tokens: K vectors per group of visual tokens that keep what the group holds."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from skipvision.plan import TokenPlan


class _Scores(nn.Module):
    """K scores per token. Not an `nn.Linear`, or PEFT's "all-linear" would adapt it."""

    def __init__(
        self, hidden_size: int, scores: int, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.out_features = scores
        self.weight = nn.Parameter(torch.zeros(scores, hidden_size, dtype=dtype, device=device))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(tokens, self.weight)


class SummaryLayer(nn.Module):
    """K scores per token from LayerNorm + Linear; softmax over the group; weighted sum.

    One layer serves all groups. Its weights start at zero, so an untrained summary is the mean.

    Args:
        hidden_size: H, width of the decoder.
        summary_tokens: K, summaries per group.
    """

    def __init__(
        self,
        hidden_size: int,
        summary_tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, dtype=dtype, device=device)
        self.score = _Scores(hidden_size, summary_tokens, dtype, device)

    def forward(self, reduced: torch.Tensor, plan: TokenPlan | None) -> torch.Tensor:
        """Fill the summary slots of a merged batch.

        Args:
            reduced: (B, L, H) embeddings with zeros at the summary slots.
            plan: the plan that reduced them; None for a batch without images. Such a batch does not change,
                but its backward gives the layer gradients of zero: processes that train together wait for
                each other's gradients, whether a batch has images or not.

        Returns:
            (B, L, H) with each summary token in its slot.
        """
        if plan is None:
            return reduced + self._scores(reduced[:0]).sum().to(reduced.dtype)
        members = (plan.group >= 0).flatten().nonzero().squeeze(1)
        group = plan.group.flatten()[members]
        tokens = reduced.flatten(0, 1).index_select(0, members)
        scores = self._scores(tokens)
        weights = _softmax_by_group(
            scores.to(torch.promote_types(scores.dtype, torch.float32)), group, 2 * plan.images
        )
        weighted = weights[:, :, None] * tokens[:, None, :].to(weights.dtype)
        summaries = weighted.new_zeros(2 * plan.images, *weighted.shape[1:]).index_add(0, group, weighted)
        slots = (plan.summary_slot >= 0).nonzero(as_tuple=True)
        chosen = summaries.flatten(0, 1)[plan.summary_slot[slots]]
        return reduced.index_put(slots, chosen.to(reduced.dtype))

    def _scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """(…, H) → (…, K)."""
        return self.score(self.norm(tokens.to(self.norm.weight.dtype)))


def _softmax_by_group(scores: torch.Tensor, group: torch.Tensor, groups: int) -> torch.Tensor:
    """(n, K) softmax of scores (n, K) over the tokens that share a group (n,)."""
    index = group[:, None].expand_as(scores)
    # The shift only keeps exp in range. The softmax does not depend on it, nor does its gradient.
    shift = scores.detach().new_full((groups, scores.shape[1]), -float("inf"))
    shift = shift.scatter_reduce(0, index, scores.detach(), "amax")
    exponentials = (scores - shift[group]).exp()
    totals = exponentials.new_zeros(groups, scores.shape[1]).index_add(0, group, exponentials)
    return exponentials / totals[group]
