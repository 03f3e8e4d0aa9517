"""Which pixels of an image each of its visual tokens was made from, by the family's way of cutting it.

How a family cuts an image is one word in `skipvision.anatomy.families`:

    square           one resize (and centre crop) to the tower's size: one view
    grid             resized to whole patches, as many as the image asks for: one view
    tiles            resized to whole tiles, cut row by row; then the whole image
    canvas           the same on the canvas of tiles that is closest in shape
    any_resolution   the whole image; then a padded canvas, the padding cut off, a mark behind each row
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, isqrt
from typing import Any

import torch
from PIL import Image
from transformers import PretrainedConfig
from transformers.image_processing_utils import select_best_resolution
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from skipvision.anatomy.families import FAMILIES, Geometry, family_of
from skipvision.errors import InputError, UnsupportedModelError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of the original image."""

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True)
class View:
    """A grid of visual tokens over a part of an image, or over all of it.

    Attributes:
        rows: of tokens.
        columns: of tokens.
        box: what the grid covers; it may reach beyond the image, where that was padded.
        lead: tokens before the grid that cover nothing (a class token).
        row_end: tokens behind each row that cover nothing (marks).
    """

    rows: int
    columns: int
    box: Box
    lead: int = 0
    row_end: int = 0

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.lead + self.rows * (self.columns + self.row_end)

    def boxes(self, size: Size) -> list[Box | None]:
        """What each token covers of an image of ``size``, in order; None where that is nothing."""
        left, top, right, bottom = self.box
        width, height = (right - left) / self.columns, (bottom - top) / self.rows
        boxes: list[Box | None] = [None] * self.lead
        for row in range(self.rows):
            boxes += [
                _within(
                    (
                        left + column * width,
                        top + row * height,
                        left + (column + 1) * width,
                        top + (row + 1) * height,
                    ),
                    size,
                )
                for column in range(self.columns)
            ]
            boxes += [None] * self.row_end
        return boxes


def views_of(
    config: PretrainedConfig,
    processor: Any,
    inputs: Mapping[str, torch.Tensor],
    sizes: Sequence[Size],
    visual: int,
) -> list[tuple[View, ...]]:
    """The views of each image, in the order of their tokens.

    Args:
        config: of the model.
        processor: that made the inputs, or its image processor.
        inputs: what it made.
        sizes: of the images, in the order of the prompt.
        visual: visual tokens in the prompts, together.

    Raises:
        UnsupportedModelError: how the family cuts images is not known, or not with these settings.
        InputError: the views do not have the prompts' number of visual tokens.
    """
    geometry = family_of(config).geometry
    if geometry is None:
        known = [name for name, family in FAMILIES.items() if family.geometry]
        raise UnsupportedModelError(
            f"how {config.model_type} cuts an image into visual tokens is not known: it is for "
            f"{', '.join(known)}",
            "where visual tokens lie in an image is not known",
        )
    image_processor = getattr(processor, "image_processor", processor)
    cut = _Cut(config, image_processor, inputs, visual // max(len(sizes), 1))
    views = [_CUTS[geometry](cut, number, size) for number, size in enumerate(sizes)]
    found = sum(view.tokens for image in views for view in image)
    if found != visual:
        raise InputError(
            f"images of {list(sizes)} pixels are cut into {found} visual tokens by this "
            f"{type(image_processor).__name__}, but the prompt has {visual}: pass the processor's own "
            "output, made without other settings, and the images it was made from"
        )
    return views


@dataclass(frozen=True)
class _Cut:
    """What there is to know of one call of a processor; ``each`` is visual tokens a picture on average."""

    config: Any
    image_processor: Any
    inputs: Mapping[str, torch.Tensor]
    each: int

    @property
    def patch(self) -> int:
        return int(self.config.vision_config.patch_size)

    @property
    def tower(self) -> int:
        """Pixels along a side of what the tower takes; towers speak of squares, some in two numbers."""
        side = self.config.vision_config.image_size
        return int(side if isinstance(side, int) else side[0])

    def square(self, number: int, size: Size) -> tuple[View, ...]:
        height, width = self.inputs["pixel_values"].shape[-2:]
        box = _cropped(self.image_processor, size, (width, height))
        side = isqrt(self.each)
        # A tower whose size is no multiple of its patch leaves a rim out.
        rim = self.patch * (width // self.patch) / width, self.patch * (height // self.patch) / height
        return (View(side, side, _part(box, (0, 0, *rim)), lead=self.each - side**2),)

    def grid(self, number: int, size: Size) -> tuple[View, ...]:
        merge = self.config.vision_config.spatial_merge_size
        _, rows, columns = self.inputs["image_grid_thw"][number].tolist()
        return (View(rows // merge, columns // merge, _whole(size)),)

    def tiles(self, number: int, size: Size) -> tuple[View, ...]:
        blank = Image.new("RGB", size)
        cut = self.image_processor([[blank]], return_row_col_info=True)
        side = self.tower // self.patch // self.config.scale_factor
        return _tiled(int(cut["rows"][0][0]), int(cut["cols"][0][0]), side, size)

    def canvas(self, number: int, size: Size) -> tuple[View, ...]:
        patch = self.config.vision_config.patch_size
        side = int(
            self.tower // (patch if isinstance(patch, int) else patch[0]) * self.config.downsample_ratio
        )
        if self.each == side**2:
            return _tiled(1, 1, side, size)
        settings = self.image_processor
        tile = settings.size["height"], settings.size["width"]
        columns, rows = get_optimal_tiled_canvas(size[::-1], tile, settings.min_patches, settings.max_patches)
        return _tiled(rows, columns, side, size)

    def any_resolution(self, number: int, size: Size) -> tuple[View, ...]:
        width, height = size
        side = self.tower // self.patch
        whole = View(side, side, _whole(size))
        canvas_height, canvas_width = select_best_resolution(
            (height, width), self.config.image_grid_pinpoints
        )
        rows, columns = canvas_height // self.tower * side, canvas_width // self.tower * side
        scale = min(canvas_width / width, canvas_height / height)
        fitted = min(ceil(width * scale), canvas_width), min(ceil(height * scale), canvas_height)
        left, top = (canvas_width - fitted[0]) // 2, (canvas_height - fitted[1]) // 2
        # The image lies in the middle of the canvas; of what was padded, whole features are cut off.
        if width / height > columns / rows:
            cut = (rows - int(round(height * (columns / width), 7))) // 2
            kept = (0, cut, columns, rows - cut)
        else:
            cut = (columns - int(round(width * (rows / height), 7))) // 2
            kept = (cut, 0, columns - cut, rows)
        across, down = width / fitted[0], height / fitted[1]
        box = (
            (kept[0] * self.patch - left) * across,
            (kept[1] * self.patch - top) * down,
            (kept[2] * self.patch - left) * across,
            (kept[3] * self.patch - top) * down,
        )
        return whole, View(kept[3] - kept[1], kept[2] - kept[0], box, row_end=1)


_CUTS: dict[Geometry, Callable[[_Cut, int, Size], tuple[View, ...]]] = {
    "square": _Cut.square,
    "grid": _Cut.grid,
    "tiles": _Cut.tiles,
    "canvas": _Cut.canvas,
    "any_resolution": _Cut.any_resolution,
}


def _tiled(rows: int, columns: int, side: int, size: Size) -> tuple[View, ...]:
    """Tiles of ``side`` × ``side`` tokens row by row, then the whole image; only that if it is one tile."""
    whole = View(side, side, _whole(size))
    if rows * columns <= 1:
        return (whole,)
    tiles = [
        View(
            side,
            side,
            _part(_whole(size), (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)),
        )
        for row, column in product(range(rows), range(columns))
    ]
    return (*tiles, whole)


def _cropped(settings: Any, size: Size, made: Size) -> Box:
    """The part of an image that was made into ``made`` pixels by padding, resizing and cropping it."""
    width, height = size
    left = top = 0.0
    if getattr(settings, "do_pad", False):
        left, top = -((max(size) - width) // 2), -((max(size) - height) // 2)
        width = height = max(size)
    resized = _resized(settings, (width, height)) if settings.do_resize else (width, height)
    cropped = resized
    if getattr(settings, "do_center_crop", False):
        cropped = settings.crop_size["width"], settings.crop_size["height"]
    if cropped != made:
        raise UnsupportedModelError(
            f"{type(settings).__name__} made {made} pixels of an image of {size}, where its settings say "
            f"{cropped}: how it cuts images is not known",
            "the image processor's settings are not known",
        )
    across, down = width / resized[0], height / resized[1]
    x, y = (resized[0] - cropped[0]) // 2, (resized[1] - cropped[1]) // 2
    return (
        left + x * across,
        top + y * down,
        left + (x + cropped[0]) * across,
        top + (y + cropped[1]) * down,
    )


def _resized(settings: Any, size: Size) -> Size:
    wanted = {name: value for name, value in dict(settings.size).items() if value}
    if wanted.keys() == {"height", "width"}:
        return wanted["width"], wanted["height"]
    if wanted.keys() == {"shortest_edge"}:
        short, edge = min(size), wanted["shortest_edge"]
        width, height = (edge if side == short else int(edge * side / short) for side in size)
        return width, height
    raise UnsupportedModelError(
        f"{type(settings).__name__} has size={wanted}: how it resizes images is not known",
        "the image processor's settings are not known",
    )


def _whole(size: Size) -> Box:
    return 0.0, 0.0, float(size[0]), float(size[1])


def _part(box: Box, fractions: Box) -> Box:
    """The part of a box that is given in fractions of it."""
    left, top, right, bottom = box
    x0, y0, x1, y1 = fractions
    width, height = right - left, bottom - top
    return left + x0 * width, top + y0 * height, left + x1 * width, top + y1 * height


def _within(box: Box, size: Size) -> Box | None:
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[2], float(size[0])), min(box[3], float(size[1]))
    return (left, top, right, bottom) if left < right and top < bottom else None
