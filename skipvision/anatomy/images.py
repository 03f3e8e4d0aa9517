"""The positions of a batch's images among its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from skipvision.errors import InputError


@dataclass(frozen=True, eq=False)
class Images:
    """The visual tokens of the I images of a batch, padded to N, the size of the largest.

    Attributes:
        index: (I, N) flat index into (B · T) of each image's visual tokens in order.
        valid: (I, N) False at padding, after the last token of a smaller image.
        sizes: tokens of each image.
        row: (I,) batch row of each image.
        length: T, the caller's length.
    """

    index: torch.Tensor
    valid: torch.Tensor
    sizes: list[int]
    row: torch.Tensor
    length: int

    @classmethod
    def locate(cls, visual: torch.Tensor, sizes: list[int], tiles: bool = False) -> Images:
        """Cut the True entries of ``visual`` (B, T), row by row, into images of the given sizes.

        With ``tiles``, adjacent entries are tiles of one image.

        Raises:
            InputError: the sizes do not add up to the visual positions, or an image would span two rows.
        """
        found = visual.flatten().nonzero().squeeze(1)
        if sum(sizes) != found.numel():
            drafted = (
                ". If prompt_lookup_num_tokens is set, the draft may repeat image placeholders of the "
                "prompt, which transformers cannot read either: generate without it"
            )
            raise InputError(
                f"the prompt has {found.numel()} image placeholders but the images have {sizes} visual "
                f"tokens (together {sum(sizes)}): build input_ids and pixel_values with one processor call"
                + (drafted if found.numel() > sum(sizes) else "")
            )
        if tiles:
            sizes = _joined(found, sizes, visual.shape[1])
        lengths = torch.tensor(sizes, dtype=torch.long, device=visual.device)
        begin = lengths.cumsum(0) - lengths
        place = torch.arange(max(sizes, default=0), device=visual.device)
        valid = place < lengths[:, None]
        index = found[(begin[:, None] + place).clamp(max=max(found.numel() - 1, 0))]
        row = index // visual.shape[1]
        if bool(((row != row[:, :1]) & valid).any()):
            raise InputError(
                f"images of {sizes} visual tokens would span two rows of the batch: the placeholders "
                "of a row do not add up to whole images"
            )
        return cls(index, valid, sizes, row[:, 0].contiguous(), visual.shape[1])

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, …) → (I, N, …): the values at the images' tokens, arbitrary at padding."""
        return values.flatten(0, 1)[self.index]

    def spread(self, values: torch.Tensor, rows: int, elsewhere: int) -> torch.Tensor:
        """(I, N) → (B, T) long: the images' values at their tokens, ``elsewhere`` at other positions."""
        whole = torch.full((rows * self.length,), elsewhere, dtype=torch.long, device=values.device)
        token, position = self._real
        return whole.index_put((position,), values.flatten()[token].long()).unflatten(0, (rows, -1))

    @cached_property
    def _real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) flat indices of all images' tokens into (I · N), and into (B · T)."""
        token = self.valid.flatten().nonzero().squeeze(1)
        return token, self.index.flatten()[token]

    def everywhere(self, rows: int) -> torch.Tensor:
        """(B, T) True at visual tokens, for a batch of ``rows`` rows."""
        return self.spread(torch.ones_like(self.index), rows, 0).bool()

    @property
    def position(self) -> torch.Tensor:
        """(I, N) position of each visual token in its own row."""
        return self.index % self.length


def _joined(found: torch.Tensor, sizes: list[int], length: int) -> list[int]:
    """Add up entries that are adjacent in one row, and return the sizes of these runs."""
    begins = torch.tensor(sizes[:-1], dtype=torch.long).cumsum(0).to(found.device)
    at = found[begins]
    apart = ((at != found[begins - 1] + 1) | (at % length == 0)).tolist()
    joined = sizes[:1]
    for size, new in zip(sizes[1:], apart, strict=True):
        if new:
            joined.append(size)
        else:
            joined[-1] += size
    return joined
