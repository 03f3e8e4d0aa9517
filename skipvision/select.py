"""Selection: a criterion scores visual tokens, and each image retains its highest scores.

A criterion scores one padded tensor of all images of the batch, so images of different sizes need no loop.
The choice of tokens is discrete, so scores need no gradients.

A new criterion is one function and one call of `register_criterion`, here or in another package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import torch

from skipvision.anatomy.probe import Probe, check_attention, check_feed_forward, ffn_ratio, prompt_attention
from skipvision.determinantal import by_relevance
from skipvision.errors import ConfigError
from skipvision.registry import Registry
from skipvision.tokens import Counts, Flops, VisualTokens, no_products

Score = Callable[[VisualTokens, torch.Tensor, int], torch.Tensor]
"""(tokens, (I,) retained counts, seed) → (I, N) scores."""
Reads = Literal["features", "views", "tower", "prompt", "decoder"]


@dataclass(frozen=True)
class Criterion:
    """A criterion by which the retained tokens are chosen; see `register_criterion`."""

    name: str
    score: Score
    reads: Reads = "features"
    probe: Probe | None = None
    sees_prompt: bool = False
    needs_patches: bool = False
    seeded: bool = False
    flops: Flops = no_products

    @property
    def function(self) -> Score:
        """The score function (`Registry` reads it as `function`)."""
        return self.score

    @property
    def setting(self) -> str:
        """The setting that selects it, for messages."""
        return f"select={self.name!r}"


CRITERIA: Registry[Criterion] = Registry("criterion")


def register_criterion(
    name: str,
    score: Score,
    *,
    reads: Reads = "features",
    probe: Probe | None = None,
    sees_prompt: bool = False,
    needs_patches: bool = False,
    seeded: bool = False,
    flops: Flops = no_products,
) -> Criterion:
    """Make a criterion available as ``SkipConfig(select=name)``.

    Other processes (Ray workers, replicas of the endpoint, the command line) register it by importing its
    module: `skipvision.registry` describes both places to name that module.

    Args:
        name: value of ``SkipConfig.select``.
        score: ``score(tokens, counts, seed)`` returns (I, N) scores of the `VisualTokens` of I images,
            without gradients. Each image retains its ``counts[i]`` highest scores. ``seed`` is
            ``SkipConfig.seed``.
        reads: what it scores by: "features" alone, or also ``tokens.reading``, which holds for "views" True
            at the tokens of the whole image's view, for "tower" the attention that each patch receives in the
            vision tower, for "prompt" the relevance of each token to the text, and for "decoder" what
            ``probe`` returns.
        probe: reads the decoder's layer ``SkipConfig.probe_layer`` in an `EarlyRun` over the unreduced
            sequence and returns (B, T) values.
        sees_prompt: scores depend on text after the image, so a plan holds for one prompt only; always so
            for "prompt".
        needs_patches: each visual token must be a patch of one square image.
        seeded: scores depend on the seed.
        flops: ``flops(N, counts, width)`` returns the FLOPs of ``score`` for one image of N tokens. The cost
            of reading tower and decoder is measured and needs no formula.

    Raises:
        ConfigError: the name is taken, ``reads`` is unknown, or it contradicts ``probe``.
    """
    if reads not in get_args(Reads) or (probe is not None) != (reads == "decoder"):
        raise ConfigError(
            f"criterion {name!r} has reads={reads!r} and probe={probe!r}: reads is one of "
            f"{', '.join(get_args(Reads))}, and 'decoder' alone takes a probe"
        )
    sees_prompt = sees_prompt or reads == "prompt"
    return CRITERIA.add(Criterion(name, score, reads, probe, sees_prompt, needs_patches, seeded, flops))


def by_similarity(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Retain the least redundant tokens."""
    return -tokens.redundancy


def by_norm(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Retain the longest feature vectors."""
    return tokens.features.detach().float().norm(dim=-1)


def by_diversity(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Max-min distance: each next token is the one farthest (1 − cosine) from those already chosen.

    As DivPrune (CVPR 2025, arXiv 2503.02175): the first is the token whose nearest neighbour is farthest
    away.
    """
    unit, valid = tokens.unit, tokens.valid
    similarity = unit @ unit.transpose(1, 2)
    # The product is symmetric only up to rounding, but nearest neighbours of each other must tie.
    distance = 1 - (similarity + similarity.transpose(1, 2)) / 2
    distance.masked_fill_(~valid[:, None, :], float("inf"))
    distance.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    first = distance.amin(dim=2).masked_fill(~valid, -float("inf")).argmax(dim=1)
    # No token is farther from the chosen ones than one of them, so none is chosen twice.
    distance.diagonal(dim1=1, dim2=2).fill_(-float("inf"))
    nearest = torch.where(valid, float("inf"), -float("inf")).to(distance.dtype)
    order = first.new_empty(len(valid), int(counts.max()) if len(counts) else 0)
    # Rows are short: on a CPU, a call of NumPy takes a fraction of one of PyTorch.
    chain = chain_by_numpy if order.device.type == "cpu" else chain_by_torch
    chain(distance, first, nearest, order)
    worth = torch.arange(order.shape[1], 0, -1, dtype=distance.dtype, device=order.device)
    # An image of fewer tokens repeats some at the end; their first place counts.
    scores = torch.zeros(valid.shape, dtype=distance.dtype, device=order.device)
    return scores.scatter_reduce_(1, order, worth.expand_as(order), "amax")


def chain_by_numpy(
    distance: torch.Tensor, first: torch.Tensor, nearest: torch.Tensor, order: torch.Tensor
) -> None:
    """Fill ``order``: each token is the one farthest from all those before it.

    Args:
        distance: (I, N, N) −∞ from a token to itself.
        first: (I,) the tokens to begin with.
        nearest: (I, N) distance to the tokens chosen already: ∞ at tokens, −∞ at padding. It is changed.
        order: (I, S) is filled.
    """
    images = zip(distance.numpy(), first.tolist(), nearest.numpy(), order.numpy(), strict=True)
    for rows, last, near, chosen in images:
        for step in range(len(chosen)):
            chosen[step] = last
            np.minimum(near, rows[last], out=near)
            last = int(near.argmax())


def chain_by_torch(
    distance: torch.Tensor, first: torch.Tensor, nearest: torch.Tensor, order: torch.Tensor
) -> None:
    """Do the same for all images at once, without waiting for a GPU."""
    rows = distance.flatten(0, 1)
    offsets = torch.arange(len(first), device=first.device) * distance.shape[1]
    last = first
    for step in range(order.shape[1]):
        order[:, step] = last
        torch.minimum(nearest, rows.index_select(0, offsets + last), out=nearest)
        last = nearest.argmax(dim=1)


def by_position(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Retain evenly spaced tokens in raster order: token ⌊(i + ½) · N / N_r⌋ for i < N_r."""
    valid = tokens.valid
    sizes = valid.sum(dim=1, keepdim=True)
    length = valid.shape[1]
    step = torch.arange(length, device=valid.device).expand_as(valid)
    retained = counts[:, None]
    index = ((2 * step + 1) * sizes).div(2 * retained.clamp(min=1), rounding_mode="floor")
    index = index.masked_fill(step >= retained, length)
    score = torch.zeros(len(valid), length + 1, device=valid.device)
    return score.scatter_(1, index, 1.0)[:, :length]


def by_chance(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Retain random positions. The pattern depends on the seed alone and is the same for all images.

    So a row gets the same plan alone and in any batch.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens.valid.shape[1], generator=generator, dtype=torch.float64)
    return order.to(tokens.valid.device).expand(tokens.valid.shape)


def by_view(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Retain the whole image's view before any crop; within each, the least redundant tokens."""
    score = (-tokens.redundancy).masked_fill(~tokens.valid, 0)
    low, high = score.amin(dim=1, keepdim=True), score.amax(dim=1, keepdim=True)
    return (score - low) / (high - low).clamp(min=1e-12) + 2 * by_reading(tokens, counts, seed)


def by_reading(tokens: VisualTokens, counts: torch.Tensor, seed: int) -> torch.Tensor:
    """Retain the tokens with the highest readings."""
    return cast(torch.Tensor, tokens.reading)


def _all_pairs(tokens: int, counts: Counts, width: int) -> int:
    return 2 * tokens * tokens * width if counts.retained < tokens else 0


register_criterion("similarity", by_similarity)
register_criterion("ffn_ratio", by_reading, reads="decoder", probe=Probe(ffn_ratio, check_feed_forward))
register_criterion("diversity", by_diversity, flops=_all_pairs)
register_criterion("norm", by_norm)
register_criterion("views", by_view, reads="views")
register_criterion("uniform", by_position)
register_criterion("random", by_chance, seeded=True)
register_criterion(
    "attention", by_reading, reads="decoder", probe=Probe(prompt_attention, check_attention), sees_prompt=True
)
register_criterion("vision_attention", by_reading, reads="tower", needs_patches=True)
register_criterion("relevance", by_relevance, reads="prompt", flops=_all_pairs)


def top(scores: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """(I, N) mask of each image's ``counts`` (I,) highest scores; ties go to the earlier token."""
    order = scores.masked_fill(~valid, -float("inf")).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < counts[:, None]) & valid
