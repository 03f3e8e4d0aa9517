"""From visual embeddings to a `TokenPlan`: select, then merge, then lay out the reduced sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skipvision.config import SkipConfig
from skipvision.errors import InputError
from skipvision.merge import assign
from skipvision.plan import TokenPlan, TokenRole
from skipvision.select import CRITERIA, normalised, redundancy, top


@dataclass(frozen=True, eq=False)
class Images:
    """Where the I images of a batch stand: N is the most visual tokens one of them has.

    Attributes:
        index: (I, N) flat positions into (B · T) of each image's visual tokens in order.
        valid: (I, N) False behind the last token of a smaller image.
        sizes: tokens of each image.
        row: (I,) batch row of each image.
    """

    index: torch.Tensor
    valid: torch.Tensor
    sizes: list[int]
    row: torch.Tensor

    @classmethod
    def locate(cls, visual: torch.Tensor, sizes: list[int]) -> Images:
        """Cut the True entries of ``visual`` (B, T), row by row, into images of the given sizes."""
        found = visual.flatten().nonzero().squeeze(1)
        if sum(sizes) != found.numel():
            raise InputError(
                f"the prompt has {found.numel()} image placeholders but the images have {sizes} visual tokens "
                f"(together {sum(sizes)}): build input_ids and pixel_values with the same processor call"
            )
        most = max(sizes, default=0)
        lengths = torch.tensor(sizes, dtype=torch.long, device=visual.device)
        begin = lengths.cumsum(0) - lengths
        place = torch.arange(most, device=visual.device)
        valid = place < lengths[:, None]
        index = found[(begin[:, None] + place).clamp(max=max(found.numel() - 1, 0))]
        row = index // visual.shape[1]
        if bool(((row != row[:, :1]) & valid).any()):
            raise InputError(
                f"images of {sizes} visual tokens would stretch over two rows of the batch: the placeholders of a "
                "row do not add up to whole images"
            )
        return cls(index, valid, sizes, row[:, 0])

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, …) → (I, N, …): the images' entries, arbitrary where not ``valid``."""
        return values.flatten(0, 1)[self.index]


@torch.no_grad()
def make_plan(
    features: torch.Tensor,
    images: Images,
    attention_mask: torch.Tensor,
    config: SkipConfig,
    scores: torch.Tensor | None = None,
) -> TokenPlan:
    """Decide the whole plan of a batch.

    Args:
        features: (I, N, D) visual embeddings of the images.
        images: where they stand.
        attention_mask: (B, T) True where the caller has a token.
        config: what is asked for.
        scores: (I, N) scores that select by, for criteria that need the model ("ffn_ratio").
    """
    valid = images.valid
    counts = [config.counts(size) for size in images.sizes]
    retained_count, skipped_count = torch.tensor(counts, device=features.device).unbind(1)
    unit = normalised(features, valid)
    if scores is None:
        scores = CRITERIA[config.select](features, valid, retained_count, config.seed)
    retained = top(scores, valid, retained_count)
    target = assign(unit, redundancy(unit), valid, retained, skipped_count, config.merge)
    return _lay_out(images, attention_mask, retained, target, config)


def _lay_out(
    images: Images,
    attention_mask: torch.Tensor,
    retained: torch.Tensor,
    target: torch.Tensor,
    config: SkipConfig,
) -> TokenPlan:
    """Write the decision about the images' tokens as a plan of the whole batch.

    Every caller position and every summary token is an element with a sort key; what is dropped or
    merged away sorts behind everything, and the first L elements of each row are the reduced row.
    """
    rows, length = attention_mask.shape
    device = attention_mask.device
    flat = images.index[images.valid]
    count, most = images.valid.shape
    image_of = torch.arange(count, device=device)[:, None].expand(count, most)

    def spread(values: torch.Tensor, elsewhere: int) -> torch.Tensor:
        """(I, N) → (B, T)."""
        whole = torch.full((rows * length,), elsewhere, dtype=torch.long, device=device)
        return whole.index_put((flat,), values[images.valid].long()).unflatten(0, (rows, length))

    position = torch.arange(length, device=device).expand(rows, length)
    absolute = torch.take_along_dim(images.index, target.clamp(min=0), dim=1) % length
    lands_at = spread(torch.where(target >= 0, absolute, -1), -2)
    lands_at = torch.where(lands_at == -2, torch.where(attention_mask, position, -1), lands_at)
    survives = lands_at == position
    is_retained = spread(retained, 0).bool()
    image = spread(image_of, -1)
    visual = image >= 0
    roles = torch.where(
        visual, torch.where(is_retained, TokenRole.RETAINED, TokenRole.SKIPPED), TokenRole.TEXT
    )
    group = torch.where(visual, 2 * image + (~is_retained).long(), -1)

    # Summary tokens: K for each group that has members, in the row of its image.
    local = torch.arange(most, device=device)
    stays = (target == local) & images.valid
    members = torch.stack([stays & retained, stays & ~retained], dim=1)  # (I, 2, N)
    k = config.summary_tokens
    last = (members * (local + 1)).amax(dim=2) - 1  # (I, 2), −1 for an empty group
    image_first = images.index[:, 0] % length
    image_last = images.index[torch.arange(count, device=device), images.valid.sum(dim=1) - 1] % length
    summary_position = torch.take_along_dim(images.index, last.clamp(min=0), dim=1) % length  # (I, 2)

    # Sort keys. Raster: by position, the summaries behind the image's last token. Grouped: every token
    # of an image at the image's first position, ordered by group.
    stride = 4 * length + 2 * k + 2
    nothing = torch.iinfo(torch.long).max
    token_key = position * stride
    base = torch.stack([image_last, image_last], dim=1) * stride + 1
    step = torch.tensor([0, k], device=device)
    if config.layout == "grouped" and count:
        first = spread(image_first[:, None].expand(count, most), 0)
        token_key = torch.where(
            visual, first * stride + position - first + (~is_retained).long() * (length + k), token_key
        )
        base = image_first[:, None] * stride
        step = torch.tensor([length, 2 * length + k], device=device)
    token_key = token_key.masked_fill(~survives, nothing)
    summary_key = (base + step)[:, :, None] + torch.arange(k, device=device)  # (I, 2, K)
    summary_key = summary_key.masked_fill((last < 0)[:, :, None], nothing).flatten(1)  # (I, 2K)

    # The summaries of a row's images side by side: (B, S) with S = 2K · the most images in a row.
    nth = torch.arange(count, device=device) - torch.searchsorted(images.row, images.row)
    per_row = (int(nth.max()) + 1 if count else 0) * 2 * k
    column = nth[:, None] * 2 * k + torch.arange(2 * k, device=device)
    place = (images.row[:, None].expand_as(column), column)

    def side_by_side(values: torch.Tensor, elsewhere: int) -> torch.Tensor:
        return torch.full((rows, per_row), elsewhere, dtype=torch.long, device=device).index_put(
            place, values
        )

    slots = torch.arange(count * 2 * k, device=device).view(count, 2 * k)
    no_summary = torch.full((rows, per_row), -1, dtype=torch.long, device=device)
    no_token = torch.full_like(position, -1)
    summary_at = side_by_side(summary_position.repeat_interleave(k, dim=1), -1)
    key = torch.cat([token_key, side_by_side(summary_key, nothing)], dim=1)
    element_role = torch.cat([roles, torch.full_like(no_summary, TokenRole.SUMMARY)], dim=1)
    element_source = torch.cat([position, no_summary], dim=1)
    element_position = torch.cat([position, summary_at], dim=1)
    element_slot = torch.cat([no_token, side_by_side(slots, -1)], dim=1)
    element_group = torch.cat([group, no_summary], dim=1)

    # Order every row, pad it on the side the caller pads.
    order = key.argsort(dim=1, stable=True)
    kept = (key != nothing).sum(dim=1)
    reduced = int(kept.max())
    pads_right = not bool(attention_mask[:, -1].all())
    shift = torch.zeros_like(kept) if pads_right else reduced - kept
    at = torch.arange(reduced, device=device) - shift[:, None]
    there = (at >= 0) & (at < kept[:, None])
    chosen = torch.take_along_dim(order, at.clamp(min=0, max=order.shape[1] - 1), dim=1)

    def laid(values: torch.Tensor, padding: int) -> torch.Tensor:
        return torch.where(there, torch.take_along_dim(values, chosen, dim=1), padding)

    final_roles = laid(element_role, TokenRole.PADDING)
    # Where each surviving caller position went; one spare column takes the summaries and the padding.
    source = laid(element_source, -1)
    new_index = torch.full((rows, length + 1), -1, dtype=torch.long, device=device)
    columns = torch.arange(reduced, device=device).expand(rows, reduced)
    new_index.scatter_(1, torch.where(source >= 0, source, length), columns)
    into = torch.take_along_dim(new_index, lands_at.clamp(min=0), dim=1)
    full_path = final_roles != TokenRole.PADDING
    short_path = final_roles == TokenRole.SKIPPED
    return TokenPlan(
        roles=final_roles.to(torch.uint8),
        source=source,
        merged_into=torch.where(lands_at >= 0, into, -1),
        ffn_mask=full_path & ~short_path if config.skip_ffn else full_path,
        cache_mask=full_path & ~short_path if config.skip_kv else full_path,
        position_source=laid(element_position, -1),
        summary_slot=laid(element_slot, -1),
        group=laid(element_group, -1),
        removed=attention_mask.sum(dim=1) - kept,
        images=count,
        summary_tokens=k,
    )
