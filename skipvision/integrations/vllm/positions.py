"""Position ids of pruned images inside vLLM.

Which tokens of an image stay is known only after it is encoded, but vLLM numbers a prompt before that. So
positions are set in two steps. `number_prompt` places text after an image where it would be in the full
prompt. The embeddings of an image's tokens then bring their positions relative to the image with them, as
extra columns (`with_offsets`), and `place` sets them when the tokens enter the decoder. So they are right
with chunked prefill, and in vLLM's cache of encoded images. A token whose keys come from the prefix cache
needs no position.

Columns must be exact in bfloat16, which holds integers up to 256. So a position is written as three digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_BASE, _DIGITS = 128, 3
ONE_AXIS = 3
"""Rows of position buffers of a family with one axis: position, end of the prompt, start of the own image."""
_POSITION, _END, _START = range(ONE_AXIS)


class Span(NamedTuple):
    """The tokens of an image in a prompt.

    Attributes:
        begin: index of the first.
        kept: their number.
        positions: position ids that the image takes.
    """

    begin: int
    kept: int
    positions: int


def number_prompt(length: int, spans: Sequence[Span]) -> tuple[torch.Tensor, int]:
    """Number a prompt of a family with one axis.

    Args:
        length: of the prompt, with the tokens of pruned images.
        spans: its images, in order.

    Returns:
        (3, length) positions; rows as in `ONE_AXIS`. And what to add to the index of a generated token.
    """
    steps = torch.ones(length, dtype=torch.long)
    for span in spans:
        after = span.begin + span.kept
        if after < length:
            steps[after] += span.positions - span.kept
    position = steps.cumsum(0) - 1
    start = position.clone()
    for span in spans:
        start[span.begin : span.begin + span.kept] = position[span.begin]
    end = length + sum(span.positions - span.kept for span in spans)
    return torch.stack([position, torch.full_like(position, end), start]), end - length


def grid_positions(grids: torch.Tensor, merge: int) -> list[torch.Tensor]:
    """(3, N) for each image, relative to its first token: time, row and column, in raster order.

    Args:
        grids: (I, 3) frames, rows and columns of patches.
        merge: patches along each side of a token.
    """
    sizes = [(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]
    return [
        torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(rows), torch.arange(columns)).T
        for rows, columns in sizes
    ]


def with_offsets(embeds: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Append positions relative to the image to its embeddings.

    Args:
        embeds: (kept, X).
        offsets: (A, kept) on each of A axes.

    Returns:
        (kept, X + 3 A).
    """
    digits = [offsets // _BASE**power % _BASE for power in range(_DIGITS)]
    return torch.cat([embeds, torch.cat(digits).T.to(embeds.dtype)], dim=1)


def split_offsets(embeds: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the first ``width`` columns, and (A, n) offsets; None if there are no further columns."""
    if embeds.shape[1] == width:
        return embeds, None
    digits = embeds[:, width:].T.long().unflatten(0, (_DIGITS, -1))
    weights = torch.tensor([_BASE**power for power in range(_DIGITS)], device=embeds.device)
    return embeds[:, :width], (digits * weights[:, None, None]).sum(dim=0)


def place(
    positions: torch.Tensor, visual: torch.Tensor, begin: int, offsets: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return positions with those of images whose tokens enter the decoder now.

    Setting them twice changes nothing: they are added to the start of the image, which does not change.

    Args:
        positions: (A, length) of the whole prompt, as `number_prompt` or the family's M-RoPE numbers it.
        visual: (length,) True at images' tokens.
        begin: first token that enters now.
        offsets: (axes, n) of the images' tokens that enter now, in order. One axis: `ONE_AXIS` rows of
            positions. Three: all tokens of an image have its start as position on the first axis.
    """
    if not offsets:
        return positions
    found = visual[begin:].nonzero().squeeze(1) + begin
    relative = torch.cat(list(offsets), dim=1).to(positions.device)
    at = found[: relative.shape[1]].to(positions.device)
    one_axis = len(relative) == 1
    start = positions[_START if one_axis else 0, at]
    placed = positions.clone()
    if one_axis:
        placed[_POSITION, at] = start + relative[0]
    else:
        placed[:, at] = start + relative
    return placed


def shift_of(positions: torch.Tensor, one_axis: bool) -> int:
    """Return what to add to the index of a generated token to get its position."""
    length = positions.shape[1]
    end = positions[_END, 0] if one_axis else positions.max() + 1
    return int(end) - length if length else 0
