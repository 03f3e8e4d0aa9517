"""`TokenPlan`: which path each token takes, and which token each caller position is merged into."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch


class TokenRole(IntEnum):
    """The role of a token in the reduced sequence, which decides its path."""

    TEXT = 0
    """Not visual: attention and FFN in every layer, stays in the KV cache."""
    RETAINED = 1
    """Visual, full path: attention and FFN in every layer, stays in the KV cache."""
    SKIPPED = 2
    """Visual, short path: attention only; leaves the KV cache after prefill."""
    SUMMARY = 3
    """Summarises a group of visual tokens: full path, stays in the KV cache."""
    PADDING = 4
    """Fills a row up to the batch's length and is masked in every layer."""


PLAN_KEYWORD = "skip_vision_plan"
"""Name under which the plan travels through the decoder's keyword arguments."""


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """How a batch of B rows is reduced from T tokens per row, the caller's, to L.

    All tensors are on the model's device; −1 means "none".

    Attributes:
        roles: (B, L) `TokenRole` of every reduced token, as uint8.
        source: (B, L) caller position each token came from; −1 for SUMMARY and PADDING.
        merged_into: (B, T) reduced index that each caller position ends in; −1 if dropped or padding.
        ffn_mask: (B, L) tokens that enter the feed-forward networks of ``skip_layers``.
        cache_mask: (B, L) tokens whose keys and values stay in the cache after prefill.
        position_source: (B, L) caller position whose position id the token takes: its own, or the last of
            its group for a summary token; −1 for PADDING.
        summary_slot: (B, L) index of a SUMMARY token among the summaries of all groups, ``group · K + k``;
            −1 elsewhere.
        group: (B, L) ``2 · image + (role is SKIPPED)`` for RETAINED and SKIPPED tokens, with images numbered
            row by row over the batch; −1 elsewhere.
        removed: (B,) tokens that each row lost (negative if summaries made it longer).
        images: number of images in the batch.
        summary_tokens: K, summary tokens per group.
        skip_layers: layers whose feed-forward networks apply ``ffn_mask``; every token enters those of the
            others. None = all.
        drop: what the layers after ``SkipConfig.drop_after`` keep; None = everything.
        size_bias: attention counts `sizes`.
    """

    roles: torch.Tensor
    source: torch.Tensor
    merged_into: torch.Tensor
    ffn_mask: torch.Tensor
    cache_mask: torch.Tensor
    position_source: torch.Tensor
    summary_slot: torch.Tensor
    group: torch.Tensor
    removed: torch.Tensor
    images: int
    summary_tokens: int
    skip_layers: tuple[int, ...] | None = None
    drop: Drop | None = None
    size_bias: bool = False

    def __repr__(self) -> str:
        caller, reduced = tuple(self.merged_into.shape), tuple(self.roles.shape)
        roles = ", ".join(f"{role.name}={int(self.count(role).sum())}" for role in TokenRole)
        return f"TokenPlan(images={self.images}, {caller} → {reduced}: {roles})"

    @property
    def attention_mask(self) -> torch.Tensor:
        """(B, L) True where there is a token."""
        return self.roles != TokenRole.PADDING

    @cached_property
    def is_identity(self) -> bool:
        """Whether the reduced sequence is the caller's, with every token on the full path."""
        return (
            self.drop is None
            and self.source.shape == self.merged_into.shape
            and bool((self.source == self.merged_into).all())
            and bool((self.ffn_mask == self.attention_mask).all())
            and bool((self.cache_mask == self.attention_mask).all())
        )

    @cached_property
    def ffn_index(self) -> torch.Tensor:
        """(n,) flat indices into (B · L) of the tokens that enter the feed-forward networks."""
        return self.ffn_mask.flatten().nonzero().squeeze(1)

    @cached_property
    def mass(self) -> torch.Tensor:
        """(B, L) caller positions merged into each token, itself included; 0 for SUMMARY and PADDING."""
        into = self.merged_into
        counts = torch.zeros_like(self.source)
        return counts.scatter_add_(1, into.clamp(min=0), (into >= 0).to(counts.dtype))

    @cached_property
    def sizes(self) -> torch.Tensor | None:
        """(B, L) caller positions that attention counts each token as; None = every token counts as one.

        A summary counts as one: the tokens that it summarises are counted themselves.
        """
        return sizes_above_one(self.mass.clamp(min=1)) if self.size_bias else None

    def at_layer(self, number: int) -> TokenPlan:
        """Return the plan of one decoder layer: after ``drop_after``, the remaining tokens only."""
        return self if self.drop is None or number <= self.drop.after else self.drop.plan

    @property
    def last(self) -> TokenPlan:
        """The plan of the decoder's last layer."""
        return self if self.drop is None else self.drop.plan

    def count(self, role: TokenRole) -> torch.Tensor:
        """(B,) number of tokens of one role in each row."""
        return (self.roles == role).sum(dim=1)

    def gather(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of ``values`` (B, X, H) at ``index`` (B, Y), zeros where the index is −1."""
        return pick(values, index.clamp(min=0)).masked_fill((index < 0)[..., None], 0)

    def to_caller(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, L, H) → (B, T, H): each caller position takes the state of the token it was merged into."""
        return self.gather(hidden, self.merged_into)


@dataclass(frozen=True, eq=False)
class Drop:
    """The layers after one layer, in which no visual token but the summaries is left: M of L tokens.

    Attributes:
        after: the last layer with all tokens.
        index: (B, M) index in the reduced sequence of each token that is left; meaningless at PADDING.
        plan: of the layers after it, (B, T) → (B, M). No token is RETAINED or SKIPPED.
    """

    after: int
    index: torch.Tensor
    plan: TokenPlan

    @classmethod
    def of(cls, plan: TokenPlan, after: int, *, pads_right: bool) -> Drop:
        """Leave out a plan's visual tokens after a layer."""
        stays = (plan.roles == TokenRole.TEXT) | (plan.roles == TokenRole.SUMMARY)
        counts = stays.sum(dim=1)
        length = int(counts.max())
        # A stable sort keeps the order of those that stay.
        order = stays.to(torch.uint8).argsort(dim=1, stable=True, descending=pads_right)
        index = order[:, :length] if pads_right else order[:, stays.shape[1] - length :]
        real = torch.take_along_dim(stays, index, dim=1)

        def taken(values: torch.Tensor, padding: int) -> torch.Tensor:
            return torch.take_along_dim(values, index, dim=1).masked_fill(~real, padding)

        columns = torch.arange(length, device=index.device).expand_as(index).masked_fill(~real, -1)
        place = torch.full(stays.shape, -1, device=index.device).scatter_(1, index, columns)
        into = plan.merged_into
        left = TokenPlan(
            roles=taken(plan.roles, TokenRole.PADDING),
            source=taken(plan.source, -1),
            merged_into=torch.take_along_dim(place, into.clamp(min=0), dim=1).masked_fill(into < 0, -1),
            ffn_mask=real,
            cache_mask=real,
            position_source=taken(plan.position_source, -1),
            summary_slot=taken(plan.summary_slot, -1),
            group=taken(plan.group, -1),
            removed=plan.removed + plan.attention_mask.sum(dim=1) - counts,
            images=plan.images,
            summary_tokens=plan.summary_tokens,
        )
        return cls(after, index, left)


def sizes_above_one(sizes: torch.Tensor) -> torch.Tensor | None:
    """Return (B, L) sizes of tokens, or None if none is larger than one."""
    return sizes if bool((sizes > 1).any()) else None


def joined_sizes(*parts: tuple[torch.Tensor | None, torch.Tensor]) -> torch.Tensor | None:
    """(B, …) sizes of consecutive parts of a row; None if no part has any.

    Each part is its (B, n) sizes, or None where each is one, and another (B, n) tensor, such as its mask.
    """
    if all(sizes is None for sizes, _ in parts):
        return None
    whole = [torch.ones_like(like, dtype=torch.long) if sizes is None else sizes for sizes, like in parts]
    return torch.cat(whole, dim=1)


def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Vectors of ``values`` (B, X, H) at ``index`` (B, Y), which has no negative entries.

    Selecting whole vectors by flat index is several times cheaper than an element-wise gather.
    """
    rows, length = values.shape[:2]
    begin = torch.arange(rows, device=index.device)[:, None] * length
    return values.flatten(0, 1).index_select(0, (begin + index).flatten()).unflatten(0, index.shape)
