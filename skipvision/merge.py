"""Merging: assign each visual token to a surviving token, and average what was assigned.

The decision (`Merge.ends`, then `assign`) is made once and without gradients. Applying it (`merge_tokens`) is
differentiable.

A new merge is one function and one call of `register_merge`, here or in another package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch.nn import functional as F

from skipvision.plan import TokenPlan, pick
from skipvision.registry import Registry
from skipvision.tokens import Counts, Flops, VisualTokens, no_products

Ends = Callable[[VisualTokens, torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens, (I, N) retained, (I,) skipped counts) → (I, N) index of the token that each token ends in."""
Check = Callable[[str, int | float, int | float], str | None]
"""(name, retained, skipped) → why the merge cannot work with these amounts; None if it can."""
Fit = Callable[[int, int], int]
"""(tokens N of an image, its skipped count) → the number of skipped tokens that it can have."""


def needs_host(name: str, retained: int | float, skipped: int | float) -> str | None:
    """Require a token to merge into."""
    if retained or skipped:
        return None
    return f"retained=0 and skipped=0 leave nothing to merge into (merge={name!r}): use merge='drop'"


def needs_skipped(name: str, retained: int | float, skipped: int | float) -> str | None:
    """Require skipped tokens, unless every token is retained."""
    everything = isinstance(retained, float) and retained == 1.0
    if skipped or everything:
        return None
    return f"merge={name!r} makes the skipped tokens, but skipped=0; use merge='similarity' or 'drop'"


def as_counted(tokens: int, skipped: int) -> int:
    """Return the skipped count unchanged."""
    return skipped


@dataclass(frozen=True)
class Merge:
    """A rule that turns the tokens that are not retained into skipped tokens; see `register_merge`."""

    name: str
    ends: Ends
    check: Check = needs_host
    fit: Fit = as_counted
    needs_patches: bool = False
    flops: Flops = no_products

    @property
    def function(self) -> Ends:
        """The function that decides where tokens end (`Registry` reads it as `function`)."""
        return self.ends

    @property
    def setting(self) -> str:
        """The setting that selects it, for messages."""
        return f"merge={self.name!r}"


MERGES: Registry[Merge] = Registry("merge")


def register_merge(
    name: str,
    ends: Ends,
    *,
    check: Check = needs_host,
    fit: Fit = as_counted,
    needs_patches: bool = False,
    flops: Flops = no_products,
) -> Merge:
    """Make a merge available as ``SkipConfig(merge=name)``.

    Other processes (Ray workers, replicas of the endpoint, the command line) register it by importing its
    module: `skipvision.registry` describes both places to name that module.

    Args:
        name: value of ``SkipConfig.merge``.
        ends: ``ends(tokens, retained, skipped)`` returns (I, N) the index, in its own image, of the token
            that each token ends in, −1 to drop it. Only results for tokens that are neither padding nor
            retained are used. Exactly ``skipped[i]`` of them must map to themselves, and all others to one of
            these, to a retained token, or to −1.
        check: ``check(name, config.retained, config.skipped)`` returns why the merge cannot run with these
            amounts, or None.
        fit: ``fit(N, skipped)`` returns how many skipped tokens an image of N tokens gets, at most
            ``skipped``.
        needs_patches: each visual token must be a patch of one square image.
        flops: ``flops(N, counts, width)`` returns the FLOPs of ``ends`` for one image of N tokens.

    Raises:
        ConfigError: the name is taken.
    """
    return MERGES.add(Merge(name, ends, check, fit, needs_patches, flops))


def assign(tokens: VisualTokens, retained: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(I, N) index, in its own image, of the token that each visual token ends in.

    A token that survives ends in itself; −1 marks dropped tokens and padding.

    Args:
        tokens: the images' visual tokens.
        retained: (I, N) tokens on the full path.
        ends: (I, N) where a merge ends the rest; ignored elsewhere.
    """
    rest = tokens.valid & ~retained
    return torch.where(retained, _indices(tokens), torch.where(rest, ends, -1))


def into_most_similar(tokens: VisualTokens, retained: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """The least redundant of the rest survive, and the others join the most similar survivor.

    An image with no survivor in the rest merges into the most similar retained token.
    """
    survives = _survivors(tokens, retained, skipped)
    leaving = tokens.valid & ~retained & ~survives
    if not bool(leaving.any()):
        return _indices(tokens)
    hosts = torch.where((skipped > 0)[:, None], survives, retained)
    return torch.where(leaving, _most_similar(tokens.unit, leaving, hosts), _indices(tokens))


def into_nothing(tokens: VisualTokens, retained: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """The least redundant of the rest survive, and the others are dropped."""
    return torch.where(_survivors(tokens, retained, skipped), _indices(tokens), -1)


def into_middle_of_run(tokens: VisualTokens, retained: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """The rest is cut into N_s runs of equal length in raster order, each represented by its middle.

    Of the M tokens of the rest, the p-th is in run ⌊p · s / M⌋. So run j covers the positions from
    ⌈j · M / s⌉ up to ⌈(j + 1) · M / s⌉.
    """
    rest = tokens.valid & ~retained
    size = rest.sum(dim=1, keepdim=True).clamp(min=1)
    runs = torch.minimum(skipped[:, None], size)
    some = runs.clamp(min=1)
    run = ((rest.cumsum(dim=1) - 1).clamp(min=0) * some).div(size, rounding_mode="floor")
    begin = (run * size + some - 1).div(some, rounding_mode="floor")
    end = ((run + 1) * size + some - 1).div(some, rounding_mode="floor")
    middle = (begin + end - 1).div(2, rounding_mode="floor")
    members = (~rest).to(torch.uint8).argsort(dim=1, stable=True)
    return torch.where(runs > 0, torch.take_along_dim(members, middle, dim=1), -1)


def into_middle_of_cell(tokens: VisualTokens, retained: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """The square of all tokens is cut into a grid of N_s cells, each represented by its middle.

    A side of g tokens is cut into c parts as in adaptive pooling, but without overlap: position p is in
    part ⌊p · c / g⌋. The number of cells is rows · columns, as `_cells` returns it.
    """
    side = tokens.valid.sum(dim=1, keepdim=True).double().sqrt().long().clamp(min=1)
    rows = skipped[:, None].double().sqrt().long().clamp(min=1)
    columns = (skipped[:, None] // rows).clamp(min=1)
    position = torch.arange(tokens.valid.shape[1], device=tokens.valid.device)

    def middle(at: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        part = at * parts // side
        begin, end = ((p * side + parts - 1) // parts for p in (part, part + 1))
        return (begin + end - 1) // 2

    return middle(position // side, rows) * side + middle(position % side, columns)


def _cells(tokens: int, skipped: int) -> int:
    """Cells of the largest grid of at most ``skipped`` cells that is nearly square."""
    rows = isqrt(skipped)
    return rows * min(skipped // max(rows, 1), isqrt(tokens))


def needs_whole_image(name: str, retained: int | float, skipped: int | float) -> str | None:
    """Require that nothing is retained and something is skipped."""
    if retained == 0 and skipped != 0:
        return None
    return (
        f"merge={name!r} makes the whole image smaller: use retained=0, and skipped for the tokens of the "
        f"smaller one (retained={retained!r}, skipped={skipped!r})"
    )


def into_matches(tokens: VisualTokens, retained: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """The rest is matched in two halves and the best pairs are merged, in rounds, until N_s tokens are left.

    As ToMe (ICLR 2023, arXiv 2210.09461) merges: every second token stays, each of the others finds the most
    similar one among these, and the most similar pairs become one token, their mean weighted by the tokens
    in each. One round removes at most half of the tokens, so rounds follow until enough are gone. ToMe merges
    a few tokens in each layer of the vision tower, compares keys, and counts a token's size in attention.
    Here all merging happens at once, between tower and decoder, and compares visual embeddings.
    """
    ends = _indices(tokens)
    alive = tokens.valid & ~retained
    features = tokens.features.detach()
    # Sums suffice: only directions are compared.
    total = features.to(torch.promote_types(features.dtype, torch.float32))
    while bool(((surplus := alive.sum(dim=1) - skipped) > 0).any()):
        into = _one_round(total, alive, surplus)
        ends = torch.take_along_dim(into, ends, dim=1)
        alive = alive & (into == torch.arange(into.shape[1], device=into.device))
        total = torch.zeros_like(total).scatter_add_(1, into[..., None].expand_as(total), total)
    return ends


def _indices(tokens: VisualTokens) -> torch.Tensor:
    """(I, N) each token's own index."""
    return torch.arange(tokens.valid.shape[1], device=tokens.valid.device).expand(tokens.valid.shape)


def _survivors(tokens: VisualTokens, retained: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """(I, N) the ``skipped`` (I,) least redundant tokens of the rest."""
    rest = tokens.valid & ~retained
    order = tokens.redundancy.masked_fill(~rest, float("inf")).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, _indices(tokens).contiguous())
    return rest & (rank < skipped[:, None])


def _most_similar(unit: torch.Tensor, leaving: torch.Tensor, hosts: torch.Tensor) -> torch.Tensor:
    """(I, N) index of the most similar host of every leaving token; arbitrary elsewhere.

    Only the leaving × hosts block of the similarity matrix is computed. Both are packed to the front, so that
    images of one size make one dense product.
    """
    guests, guest_index = _pack(leaving)
    homes, home_index = _pack(hosts)
    similarity = pick(unit, guest_index) @ pick(unit, home_index).transpose(1, 2)
    similarity = similarity.masked_fill(~homes[:, None, :], -float("inf"))
    best = torch.take_along_dim(home_index, similarity.argmax(dim=2), dim=1)
    # An image's unused slots repeat real tokens: an extra column takes them, so that they overwrite nothing.
    extra = unit.shape[1]
    result = best.new_zeros(unit.shape[0], extra + 1)
    result.scatter_(1, guest_index.masked_fill(~guests, extra), best)
    return result[:, :extra]


def _pack(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (I, M) mask of used slots, and the (I, M) indices of each row's True entries in order."""
    counts = mask.sum(dim=1)
    slots = int(counts.max())
    index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :slots]
    return torch.arange(slots, device=mask.device) < counts[:, None], index


def _one_round(features: torch.Tensor, alive: torch.Tensor, surplus: torch.Tensor) -> torch.Tensor:
    """(I, N) where each token ends when at most ``surplus`` (I,) of every second one join the others."""
    used, index = _pack(alive)
    guests, homes = used[:, ::2], used[:, 1::2]
    rows, columns = (F.normalize(pick(features, at), dim=2) for at in (index[:, ::2], index[:, 1::2]))
    similarity = (rows @ columns.transpose(1, 2)).masked_fill(~homes[:, None], -torch.inf)
    best, host = similarity.max(dim=2)
    order = best.masked_fill(~guests, -torch.inf).argsort(dim=1, descending=True, stable=True)
    merges = guests & (order.argsort(dim=1) < surplus[:, None])
    host = torch.take_along_dim(index[:, 1::2], host, dim=1)
    itself = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    return itself.scatter(1, index[:, ::2], torch.where(merges, host, index[:, ::2]))


def _leaving_by_hosts(tokens: int, counts: Counts, width: int) -> int:
    leaving = tokens - counts.retained - counts.skipped
    return 2 * leaving * (counts.skipped or counts.retained) * width


def _pairs_of_halves(tokens: int, counts: Counts, width: int) -> int:
    pairs, alive = 0, tokens - counts.retained
    while alive > counts.skipped:
        guests = (alive + 1) // 2
        pairs += guests * (alive - guests)
        alive -= min(guests, alive - counts.skipped)
    return 2 * pairs * width


register_merge("similarity", into_most_similar, flops=_leaving_by_hosts)
register_merge("pool", into_middle_of_run, check=needs_skipped)
register_merge("drop", into_nothing, check=lambda name, retained, skipped: None)
register_merge("tome", into_matches, check=needs_skipped, flops=_pairs_of_halves)
register_merge("grid", into_middle_of_cell, check=needs_whole_image, fit=_cells, needs_patches=True)


def merge_tokens(embeds: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    """(B, T, H) → (B, L, H): each token becomes the mean of the caller positions merged into it.

    A token that nothing is merged into is copied bit for bit; summary and padding slots are zero.
    """
    rows, length = plan.source.shape
    reduced = plan.gather(embeds, plan.source)
    own = torch.take_along_dim(plan.source, plan.merged_into.clamp(min=0), dim=1)
    positions = torch.arange(plan.merged_into.shape[1], device=embeds.device)
    row, column = ((plan.merged_into >= 0) & (own != positions)).nonzero(as_tuple=True)
    if row.numel() == 0:
        return reduced
    host = row * length + plan.merged_into[row, column]
    guests = embeds.flatten(0, 1).index_select(0, row * embeds.shape[1] + column)
    # Half precision would lose the small addends of a large group: sum in float32.
    wide = torch.promote_types(embeds.dtype, torch.float32)
    total = reduced.to(wide).flatten(0, 1).index_add(0, host, guests.to(wide))
    mean = total / plan.mass.flatten().clamp(min=1)[:, None]
    return mean.to(embeds.dtype).unflatten(0, (rows, length))
