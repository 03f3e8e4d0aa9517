"""Layout: the surviving tokens in their order, as a `TokenPlan`.

Caller positions and summary tokens are *elements*, each with a sort key; the key of dropped and merged
elements is `_GONE`. Sorting a row by key and padding it yields the reduced row, whatever the layout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from skipvision.anatomy.images import Images
from skipvision.config import SkipConfig
from skipvision.plan import Drop, TokenPlan, TokenRole

_GONE = torch.iinfo(torch.long).max


class _Elements(NamedTuple):
    """The plan's entries of X elements, (B, X) each, named as in `TokenPlan`."""

    key: torch.Tensor
    roles: torch.Tensor
    source: torch.Tensor
    position_source: torch.Tensor
    summary_slot: torch.Tensor
    group: torch.Tensor


_PADDING = _Elements(_GONE, TokenRole.PADDING, -1, -1, -1, -1)  # type: ignore[arg-type]


def lay_out(
    images: Images,
    attention_mask: torch.Tensor,
    retained: torch.Tensor,
    target: torch.Tensor,
    config: SkipConfig,
) -> TokenPlan:
    """Make the plan of the whole batch from the decision about its images' tokens.

    Args:
        images: the images' positions in the batch.
        attention_mask: (B, T) True where the caller has a token.
        retained: (I, N) visual tokens on the full path.
        target: (I, N) the token of its own image that each ends in; −1 if dropped.
        config: number of summaries, layout, and the paths of skipped tokens.
    """
    lands_at = _landing(images, attention_mask, target)
    tokens = _token_elements(images, lands_at, retained, config)
    summaries = _summary_elements(images, attention_mask, retained, target, config)
    elements = _Elements(*(torch.cat(pair, dim=1) for pair in zip(tokens, summaries, strict=True)))
    reduced, kept = _sorted_rows(elements, attention_mask)
    real = reduced.roles != TokenRole.PADDING
    full_path = real & (reduced.roles != TokenRole.SKIPPED)
    plan = TokenPlan(
        roles=reduced.roles.to(torch.uint8),
        source=reduced.source,
        merged_into=_merged_into(reduced.source, lands_at),
        ffn_mask=full_path if config.skip_ffn else real,
        cache_mask=full_path if config.skip_kv else real,
        position_source=reduced.position_source,
        summary_slot=reduced.summary_slot,
        group=reduced.group,
        removed=attention_mask.sum(dim=1) - kept,
        images=len(images.sizes),
        summary_tokens=config.summary_tokens,
        skip_layers=None if config.skip_layers == "all" else config.skip_layers,
        size_bias=config.size_bias,
    )
    if config.drop_after is None:
        return plan
    drop = Drop.of(plan, config.drop_after, pads_right=_pads_right(attention_mask))
    return replace(plan, drop=drop)


def _landing(images: Images, attention_mask: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(B, T) caller position that each caller position ends in; −1 if dropped or padding."""
    rows, length = attention_mask.shape
    at = torch.take_along_dim(images.position, target.clamp(min=0), dim=1)
    visual = images.spread(torch.where(target >= 0, at, -1), rows, _ELSEWHERE)
    itself = torch.arange(length, device=attention_mask.device).expand(rows, length)
    return torch.where(visual == _ELSEWHERE, torch.where(attention_mask, itself, -1), visual)


_ELSEWHERE = -2


def _stride(length: int, config: SkipConfig) -> int:
    """Distance between the keys of two caller positions: large enough for an image's tokens and summaries."""
    return 4 * length + 2 * config.summary_tokens + 2


def _token_elements(
    images: Images, lands_at: torch.Tensor, retained: torch.Tensor, config: SkipConfig
) -> _Elements:
    rows, length = lands_at.shape
    position = torch.arange(length, device=lands_at.device).expand(rows, length)
    number = torch.arange(len(images.sizes), device=lands_at.device)[:, None].expand_as(retained)
    image = images.spread(number, rows, -1)
    visual = image >= 0
    short = visual & ~images.spread(retained, rows, 0).bool()
    key = position * _stride(length, config)
    if config.layout == "grouped":
        first = images.spread(images.position[:, :1].expand_as(retained), rows, 0)
        after_retained = short * (length + config.summary_tokens)
        key = torch.where(visual, first * _stride(length, config) + position - first + after_retained, key)
    none = torch.full_like(key, -1)
    on_path = torch.where(short, TokenRole.SKIPPED, TokenRole.RETAINED)
    return _Elements(
        key=key.masked_fill(lands_at != position, _GONE),
        roles=torch.where(visual, on_path, TokenRole.TEXT),
        source=position,
        position_source=position,
        summary_slot=none,
        group=torch.where(visual, 2 * image + short, -1),
    )


def _summary_elements(
    images: Images,
    attention_mask: torch.Tensor,
    retained: torch.Tensor,
    target: torch.Tensor,
    config: SkipConfig,
) -> _Elements:
    """K summary tokens for each group that has members, adjacent for the groups of one image."""
    count, longest = retained.shape
    rows, length = attention_mask.shape
    k, device = config.summary_tokens, attention_mask.device
    local = torch.arange(longest, device=device)
    stays = (target == local) & images.valid
    members = torch.stack([stays & retained, stays & ~retained], dim=1)
    last = (members * (local + 1)).amax(dim=2) - 1  # (I, 2), −1 for an empty group
    if config.layout == "grouped":
        anchor = images.position[:, :1]
        step = torch.tensor([length, 2 * length + k], device=device)
    else:
        anchor = torch.take_along_dim(images.position, last.amax(dim=1, keepdim=True).clamp(min=0), dim=1)
        step = torch.tensor([1, 1 + k], device=device)
    key = (anchor * _stride(length, config) + step).masked_fill(last < 0, _GONE)
    key = key[:, :, None] + torch.arange(k, device=device) * (last >= 0)[:, :, None]
    position = torch.take_along_dim(images.position, last.clamp(min=0), dim=1)

    # The n-th image of a row has its 2K summaries in columns n · 2K …
    nth = torch.arange(count, device=device) - torch.searchsorted(images.row, images.row)
    column = nth[:, None] * 2 * k + torch.arange(2 * k, device=device)
    columns = int(nth.max() + 1) * 2 * k

    def in_rows(values: torch.Tensor, elsewhere: int) -> torch.Tensor:
        whole = torch.full((rows, columns), elsewhere, dtype=torch.long, device=device)
        return whole.index_put((images.row[:, None].expand_as(column), column), values)

    none = torch.full((rows, columns), -1, dtype=torch.long, device=device)
    return _Elements(
        key=in_rows(key.flatten(1), _GONE),
        roles=torch.full_like(none, TokenRole.SUMMARY),
        source=none,
        position_source=in_rows(position.repeat_interleave(k, dim=1), -1),
        summary_slot=in_rows(torch.arange(count * 2 * k, device=device).view(count, 2 * k), -1),
        group=none,
    )


def _sorted_rows(elements: _Elements, attention_mask: torch.Tensor) -> tuple[_Elements, torch.Tensor]:
    """Sort the surviving elements of each row and pad them to one length, on the caller's side.

    Returns:
        The (B, L) elements, and the (B,) number of survivors.
    """
    order = elements.key.argsort(dim=1, stable=True)
    kept = (elements.key != _GONE).sum(dim=1)
    length = int(kept.max())
    padding = torch.zeros_like(kept) if _pads_right(attention_mask) else length - kept
    slot = torch.arange(length, device=order.device) - padding[:, None]
    used = (slot >= 0) & (slot < kept[:, None])
    chosen = torch.take_along_dim(order, slot.clamp(min=0), dim=1)
    rows = (
        torch.where(used, torch.take_along_dim(values, chosen, dim=1), padded)
        for values, padded in zip(elements, _PADDING, strict=True)
    )
    return _Elements(*rows), kept


def _pads_right(attention_mask: torch.Tensor) -> bool:
    return not bool(attention_mask[:, -1].all())


def _merged_into(source: torch.Tensor, lands_at: torch.Tensor) -> torch.Tensor:
    """(B, T) reduced index of the token that each caller position ends in; −1 for none."""
    rows, length = lands_at.shape
    columns = torch.arange(source.shape[1], device=source.device).expand_as(source)
    # An extra column takes summaries and padding, which have no caller position.
    index = torch.full((rows, length + 1), -1, dtype=torch.long, device=source.device)
    index.scatter_(1, torch.where(source >= 0, source, length), columns)
    into = torch.take_along_dim(index, lands_at.clamp(min=0), dim=1)
    return torch.where(lands_at >= 0, into, -1)
