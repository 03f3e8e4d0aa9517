"""The visual tokens of a batch's images: what every criterion and every merge reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class Counts(NamedTuple):
    """How many tokens of each role one image contributes to the reduced sequence."""

    retained: int
    skipped: int
    summaries: int

    @property
    def total(self) -> int:
        """Tokens of the image in the reduced sequence."""
        return sum(self)


Flops = Callable[[int, Counts, int], int]
"""(tokens N of an image, its counts, width D) → FLOPs of one image."""


def no_products(tokens: int, counts: Counts, width: int) -> int:
    """Return 0: the method has no matrix products."""
    return 0


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The visual tokens of I images, padded to N, the largest image's number of tokens.

    Attributes:
        features: (I, N, D) visual embeddings.
        valid: (I, N) False at padding.
        reading: (I, N) what the criterion reads from the model; None if it reads features alone.
    """

    features: torch.Tensor
    valid: torch.Tensor
    reading: torch.Tensor | None = None

    @cached_property
    def unit(self) -> torch.Tensor:
        """(I, N, D) features scaled to length 1, in at least float32; zero at padding."""
        features = self.features.detach()
        wide = features.to(torch.promote_types(features.dtype, torch.float32))
        scale = (self.valid / wide.norm(dim=-1).clamp(min=1e-12))[..., None]
        # A copy is scaled in place: one more tensor of this size would take longer than the product.
        return wide * scale if wide.dtype == features.dtype else wide.mul_(scale)

    @cached_property
    def redundancy(self) -> torch.Tensor:
        """(I, N) summed cosine similarity of each token to the other tokens of its image.

        Σ_j cos(i, j) = x̂_i · Σ_j x̂_j costs O(N); subtracting 1 leaves out the token itself.
        """
        total = self.unit.sum(dim=1, keepdim=True)
        return (self.unit * total).sum(-1) - self.valid.to(total.dtype)
