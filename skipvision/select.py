"""Who is retained: scores of an image's visual tokens, highest kept (METHOD piece 1).

Every criterion sees one padded tensor of all images of the batch, so that images of different sizes
need no loop. Nothing here keeps gradients: which tokens stay is a decision, not a function to
differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of a batch's images, and what more than one step wants to know of them.

    Attributes:
        features: (I, N, D) visual embeddings.
        valid: (I, N) real tokens; the rest is padding.
    """

    features: torch.Tensor
    valid: torch.Tensor

    @cached_property
    def unit(self) -> torch.Tensor:
        """(I, N, D) unit vectors in at least float32, zero where there is no token."""
        wide = self.features.detach().to(torch.promote_types(self.features.dtype, torch.float32))
        scale = self.valid / wide.norm(dim=-1).clamp(min=1e-12)
        return wide * scale[..., None]

    @cached_property
    def redundancy(self) -> torch.Tensor:
        """(I, N) summed cosine similarity of each token to the image's other tokens.

        Σ_j cos(i, j) = x̂_i · Σ_j x̂_j, so this is linear in N; the token itself (cosine 1) is taken out.
        """
        total = self.unit.sum(dim=1, keepdim=True)
        return (self.unit * total).sum(-1) - self.valid.to(total.dtype)


def by_similarity(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """The least redundant tokens stay."""
    return -tokens.redundancy


def by_norm(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """The longest feature vectors stay."""
    return tokens.features.detach().float().norm(dim=-1)


def by_diversity(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Max-min distance: each next token is the one farthest (1 − cosine) from those already chosen.

    As DivPrune (CVPR 2025, arXiv 2503.02175): the first is the token whose nearest neighbour is
    farthest away. Steps over the retained count, all images at once.
    """
    unit, valid = tokens.unit, tokens.valid
    similarity = unit @ unit.transpose(1, 2)
    # A product is symmetric but for rounding; nearest neighbours of each other must tie.
    distance = 1 - (similarity + similarity.transpose(1, 2)) / 2
    images, places, _ = distance.shape
    never = ~valid
    distance.masked_fill_(
        never[:, None, :] | torch.eye(places, dtype=torch.bool, device=unit.device), float("inf")
    )
    nearest = distance.amin(dim=2).masked_fill(never, -float("inf"))
    score = torch.zeros(images, places, device=unit.device)
    every = torch.arange(images, device=unit.device)
    chosen = nearest.argmax(dim=1)
    nearest = torch.full_like(nearest, float("inf")).masked_fill(never, -float("inf"))
    steps = int(counts.max()) if images else 0
    for step in range(steps):
        # A smaller image has none left in the last steps; the index is then of one it chose before.
        left = nearest[every, chosen] > -float("inf")
        score[every, chosen] = torch.where(left, float(steps - step), score[every, chosen])
        nearest = torch.minimum(nearest, distance[every, chosen])
        nearest[every, chosen] = -float("inf")
        chosen = nearest.argmax(dim=1)
    return score


def by_position(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Evenly spaced in raster order: token ⌊(i + ½) · N / N_r⌋ for i < N_r."""
    valid = tokens.valid
    there = valid.sum(dim=1, keepdim=True)
    places = valid.shape[1]
    step = torch.arange(places, device=valid.device).expand_as(valid)
    kept = counts[:, None]
    landing = ((2 * step + 1) * there).div(2 * kept.clamp(min=1), rounding_mode="floor")
    landing = landing.masked_fill(step >= kept, places)
    score = torch.zeros(len(valid), places + 1, device=valid.device)
    return score.scatter_(1, landing, 1.0)[:, :places]


def by_chance(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """A random order of places that the seed alone decides: one pattern serves all images.

    So a row has the same plan alone and in any batch; another draw is another seed.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens.valid.shape[1], generator=generator, dtype=torch.float64)
    return order.to(tokens.valid.device).expand(tokens.valid.shape)


def by_view(tokens: VisualTokens, base: torch.Tensor) -> torch.Tensor:
    """The view of the whole image stays before any of its crops; within each, the least redundant.

    Args:
        tokens: as for every criterion.
        base: (I, N) True for the tokens of the base view.
    """
    score = (-tokens.redundancy).masked_fill(~tokens.valid, 0)
    low, high = score.amin(dim=1, keepdim=True), score.amax(dim=1, keepdim=True)
    return (score - low) / (high - low).clamp(min=1e-12) + 2 * base


Criterion = Callable[[VisualTokens, torch.Tensor, int], torch.Tensor]
CRITERIA: dict[str, Criterion] = {
    "similarity": by_similarity,
    "diversity": by_diversity,
    "norm": by_norm,
    "uniform": by_position,
    "random": by_chance,
}
"""Criteria that look at features alone; "ffn_ratio" and "views" get their scores from the model."""


def top(scores: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(I, N) mask of each image's ``counts`` (I,) highest scores; ties go to the earlier token."""
    order = scores.masked_fill(~valid, -float("inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < counts[:, None]) & valid
