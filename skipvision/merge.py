"""What becomes of the rest: which token each visual token ends in, and the mean that puts it there.

Deciding (`assign`) is done once and without gradients; applying (`merge_tokens`) is differentiable
(METHOD piece 2).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from skipvision.plan import TokenPlan


def assign(
    features: torch.Tensor,
    unit: torch.Tensor,
    redundancy: torch.Tensor,
    valid: torch.Tensor,
    retained: torch.Tensor,
    skipped: torch.Tensor,
    method: str,
) -> torch.Tensor:
    """(I, N) the token of its own image each visual token ends in: itself if it survives, −1 if dropped.

    Args:
        features: (I, N, D) feature vectors.
        unit: (I, N, D) the same, of length 1.
        redundancy: (I, N) summed similarity; of the rest, the least redundant survive.
        valid: (I, N) real tokens.
        retained: (I, N) tokens on the full path.
        skipped: (I,) number N_s of tokens that survive of the rest.
        method: "similarity": the others join the most similar survivor of the rest (with N_s = 0,
            the most similar retained token); "pool": the rest is cut into N_s runs of equal length
            in raster order, each represented by its middle; "tome": the rest is matched in two halves
            until N_s are left; "grid": all tokens, a square in raster order, are cut into a grid of
            N_s cells, each represented by its middle; "drop": the others disappear.
    """
    itself = torch.arange(unit.shape[1], device=unit.device).expand(unit.shape[:2])
    rest = valid & ~retained
    if method in ("pool", "tome", "grid"):
        if method == "tome":
            ends = _matched_in_halves(features, rest, skipped)
        else:
            ends = _middle_of_run(rest, skipped) if method == "pool" else _middle_of_cell(valid, skipped)
        return torch.where(retained, itself, torch.where(rest, ends, -1))
    order = redundancy.masked_fill(~rest, float("inf")).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, itself.contiguous())
    survives = rest & (rank < skipped[:, None])
    leaving = rest & ~survives
    target = torch.where(retained | survives, itself, -1)
    if method == "drop" or not bool(leaving.any()):
        return target
    hosts = torch.where((skipped > 0)[:, None], survives, retained)
    return torch.where(leaving, _most_similar(unit, leaving, hosts), target)


def _most_similar(unit: torch.Tensor, leaving: torch.Tensor, hosts: torch.Tensor) -> torch.Tensor:
    """(I, N) index of the most similar host of every leaving token (garbage elsewhere).

    Only the leaving × hosts block of the similarity matrix is computed; both are packed to the
    front, so that images of one size make one dense product.
    """
    guests, guest_index = _pack(leaving)
    homes, home_index = _pack(hosts)
    rows = torch.take_along_dim(unit, guest_index[..., None], dim=1)
    columns = torch.take_along_dim(unit, home_index[..., None], dim=1)
    similarity = (rows @ columns.transpose(1, 2)).masked_fill(~homes[:, None, :], -float("inf"))
    best = torch.take_along_dim(home_index, similarity.argmax(dim=2), dim=1)
    # An image's spare places repeat real tokens; sending them nowhere keeps them from overwriting.
    nowhere = unit.shape[1]
    result = best.new_zeros(unit.shape[0], nowhere + 1)
    result.scatter_(1, guest_index.masked_fill(~guests, nowhere), best)
    return result[:, :nowhere]


def _pack(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (I, M) of each row's True entries, in order, and which of the M places are taken."""
    counts = mask.sum(dim=1)
    most = int(counts.max())
    index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return torch.arange(most, device=mask.device) < counts[:, None], index


def _middle_of_run(rest: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
    """(I, N) middle of the run each token of the rest falls into (garbage elsewhere); −1 without runs.

    The M tokens of the rest are cut into s runs: its p-th token is in run ⌊p · s / M⌋, so run j
    covers the places from ⌈j · M / s⌉ up to ⌈(j + 1) · M / s⌉.
    """
    size = rest.sum(dim=1, keepdim=True).clamp(min=1)
    runs = torch.minimum(skipped[:, None], size)
    some = runs.clamp(min=1)
    run = ((rest.cumsum(dim=1) - 1).clamp(min=0) * some).div(size, rounding_mode="floor")
    begin = (run * size + some - 1).div(some, rounding_mode="floor")
    end = ((run + 1) * size + some - 1).div(some, rounding_mode="floor")
    middle = (begin + end - 1).div(2, rounding_mode="floor")
    members = (~rest).to(torch.uint8).argsort(dim=1, stable=True)
    return torch.where(runs > 0, torch.take_along_dim(members, middle, dim=1), -1)


def _middle_of_cell(valid: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """(I, N) middle of the cell each token of a square falls into; garbage where there is no token.

    A side of g tokens is cut into c parts as in adaptive pooling, but so that parts do not overlap: place
    p is in part ⌊p · c / g⌋. The number of cells is rows · columns, as `SkipConfig.counts` makes it.
    """
    side = valid.sum(dim=1, keepdim=True).double().sqrt().long().clamp(min=1)
    rows = cells[:, None].double().sqrt().long().clamp(min=1)
    columns = (cells[:, None] // rows).clamp(min=1)
    place = torch.arange(valid.shape[1], device=valid.device)

    def middle(at: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        part = at * parts // side
        begin, end = ((p * side + parts - 1) // parts for p in (part, part + 1))
        return (begin + end - 1) // 2

    return middle(place // side, rows) * side + middle(place % side, columns)


def _matched_in_halves(features: torch.Tensor, rest: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """(I, N) the token each of the rest is merged into when ``left`` (I,) of them are left; else itself.

    As ToMe (ICLR 2023, arXiv 2210.09461) merges: of the tokens in order, every second one stays; each other
    one finds the most similar of these, and the most similar pairs become one, the mean weighted by how
    many tokens are in it. One round takes away half of the tokens at most, so rounds follow until enough are
    gone. ToMe merges a little in each layer of the vision tower, by its keys, and counts a token's size in
    attention; here it is done at once, between tower and decoder, by the visual embeddings.
    """
    ends = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
    alive = rest
    # Sums will do for means: only directions are compared.
    total = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    while bool(((surplus := alive.sum(dim=1) - left) > 0).any()):
        into = _one_round(total, alive, surplus)
        ends = torch.take_along_dim(into, ends, dim=1)
        alive = alive & (into == torch.arange(into.shape[1], device=into.device))
        total = torch.zeros_like(total).scatter_add_(1, into[..., None].expand_as(total), total)
    return ends


def _one_round(features: torch.Tensor, alive: torch.Tensor, surplus: torch.Tensor) -> torch.Tensor:
    """(I, N) where each token goes when ``surplus`` (I,) at most of every second one join the others."""
    there, index = _pack(alive)
    guests, homes = there[:, ::2], there[:, 1::2]
    rows, columns = (
        F.normalize(torch.take_along_dim(features, at[..., None], dim=1), dim=2)
        for at in (index[:, ::2], index[:, 1::2])
    )
    alike = (rows @ columns.transpose(1, 2)).masked_fill(~homes[:, None], -torch.inf)
    best, host = alike.max(dim=2)
    order = best.masked_fill(~guests, -torch.inf).argsort(dim=1, descending=True, stable=True)
    goes = guests & (order.argsort(dim=1) < surplus[:, None])
    host = torch.take_along_dim(index[:, 1::2], host, dim=1)
    itself = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)
    return itself.scatter(1, index[:, ::2], torch.where(goes, host, index[:, ::2]))


def merge_tokens(embeds: torch.Tensor, plan: TokenPlan) -> torch.Tensor:
    """(B, T, H) → (B, L, H): every token the mean of the caller positions merged into it.

    Tokens that stand for themselves are copied bit for bit; summary and padding places are zero.
    """
    rows, length = plan.source.shape
    reduced = plan.gather(embeds, plan.source)
    own = torch.take_along_dim(plan.source, plan.merged_into.clamp(min=0), dim=1)
    places = torch.arange(plan.merged_into.shape[1], device=embeds.device)
    guests = ((plan.merged_into >= 0) & (own != places)).nonzero(as_tuple=True)
    if guests[0].numel() == 0:
        return reduced
    host = guests[0] * length + plan.merged_into[guests]
    # Half precision would lose the small ones of a large group: sum in float32.
    wide = torch.promote_types(embeds.dtype, torch.float32)
    total = reduced.to(wide).flatten(0, 1).index_add(0, host, embeds[guests].to(wide))
    mean = total / plan.mass.flatten().clamp(min=1)[:, None]
    return mean.to(embeds.dtype).unflatten(0, (rows, length))
