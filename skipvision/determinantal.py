"""Selection by a determinantal point process: tokens that are relevant to the prompt and unlike each other.

As CDPruner (NeurIPS 2025, arXiv 2506.10967). With cosines K of an image's tokens and the relevance q of each
to the prompt, scaled to 0 … 1, the retained tokens S are to have a large determinant of L_S, where
L = diag(q) K diag(q). They are chosen greedily: each next token multiplies the determinant most. By Cholesky
factors this is one row of a triangle per token (Chen et al., NeurIPS 2018, arXiv 1709.05135).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch.nn import functional as F

from skipvision.tokens import VisualTokens


@torch.no_grad()
def relevance(embeds: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """(B, T) mean cosine of each token to the words of its row, in at least float32.

    CDPruner takes it from a text encoder, where the model has one. Here it is between the decoder's input
    embeddings, which every model has.

    Args:
        embeds: (B, T, H) input embeddings, with image features at the placeholders.
        words: (B, T) tokens of the prompt that are text, those of the chat template included.
    """
    unit = F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)
    count = words.sum(dim=1).clamp(min=1)[:, None, None]
    mean = (unit * words[..., None]).sum(dim=1, keepdim=True) / count
    return (unit * mean).sum(dim=-1)


def by_relevance(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Retain tokens greedily by the determinant; ``tokens.reading`` is their relevance.

    Once no token adds to the determinant, the most relevant ones follow.
    """
    unit, valid = tokens.unit, tokens.valid
    quality = _scaled(cast(torch.Tensor, tokens.reading).to(unit.dtype), valid)
    kernel = quality[:, :, None] * (unit @ unit.transpose(1, 2)) * quality[:, None, :]
    gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(~valid, -torch.inf)
    steps = min(int(counts.max()) if len(counts) else 0, valid.shape[1])
    order = torch.full((len(valid), steps), -1, dtype=torch.long, device=valid.device)
    # Rows are short: on a CPU, a call of NumPy takes a fraction of one of PyTorch.
    choose = choose_by_numpy if order.device.type == "cpu" else choose_by_torch
    choose(kernel, gain, order)
    worth = torch.arange(steps + 1, 1, -1, dtype=quality.dtype, device=order.device).expand_as(order)
    # An extra column takes the steps in which nothing was chosen.
    scores = F.pad(quality, (0, 1))
    scores.scatter_(1, order.masked_fill(order < 0, valid.shape[1]), worth)
    return scores[:, :-1]


def _scaled(reading: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(I, N) readings from 0 to 1 in each image; all 1 if they are equal, and 0 at padding."""
    low = reading.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    high = reading.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    span = (high - low).nan_to_num()
    scaled = (reading - low) / span.clamp(min=torch.finfo(reading.dtype).tiny)
    return torch.where(span > 0, scaled, 1.0).masked_fill(~valid, 0)


def smallest_gain(kernel: torch.Tensor) -> float:
    """Return the factor of the determinant below which a token adds nothing but rounding."""
    return 100 * float(torch.finfo(kernel.dtype).eps)


def choose_by_numpy(kernel: torch.Tensor, gain: torch.Tensor, order: torch.Tensor) -> None:
    """Fill ``order``: each token multiplies the determinant of those before it most.

    Args:
        kernel: (I, N, N) L.
        gain: (I, N) its diagonal, −∞ at padding.
        order: (I, S) is filled; −1 stays where no token adds to the determinant.
    """
    smallest = smallest_gain(kernel)
    for rows, first, chosen in zip(kernel.numpy(), gain.numpy(), order.numpy(), strict=True):
        factor, added = np.empty((len(chosen), len(rows)), rows.dtype), first.copy()
        for step in range(len(chosen)):
            last = int(added.argmax())
            if added[last] <= smallest:
                break
            chosen[step] = last
            factor[step] = (rows[last] - factor[:step, last] @ factor[:step]) / np.sqrt(added[last])
            added -= factor[step] ** 2
            added[last] = -np.inf


def choose_by_torch(kernel: torch.Tensor, gain: torch.Tensor, order: torch.Tensor) -> None:
    """Do the same for all images at once, without waiting for a GPU."""
    images, smallest = torch.arange(len(kernel), device=kernel.device), smallest_gain(kernel)
    factor = kernel.new_zeros(len(kernel), order.shape[1], kernel.shape[1])
    added = gain.clone()
    for step in range(order.shape[1]):
        best, last = added.max(dim=1)
        more = best > smallest
        before = factor[images, :step, last]
        row = kernel[images, last] - (before[:, :, None] * factor[:, :step]).sum(dim=1)
        row = row / best.clamp(min=smallest).sqrt()[:, None]
        factor[:, step] = torch.where(more[:, None], row, 0)
        added = (added - factor[:, step] ** 2).scatter(1, last[:, None], -torch.inf)
        order[:, step] = torch.where(more, last, -1)
