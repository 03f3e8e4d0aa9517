"""Which pixels of an image each visual token covers.

That depends on how the family's processor cuts images, the ``geometry`` of `skipvision.anatomy.families`:

    square           one resize (and centre crop) to the tower's size: one view
    grid             resized to a multiple of the patch size, by the image's own size: one view
    tiles            resized to a multiple of the tile size and cut row by row; then the whole image
    canvas           as tiles, on the canvas of tiles with the closest aspect ratio
    any_resolution   the whole image; then a padded canvas without its padding, with a mark after each row
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
"""Width and height of an image in pixels."""


@dataclass(frozen=True)
class View:
    """A grid of visual tokens over a part of an image, or over all of it.

    Attributes:
        rows: rows of tokens.
        columns: columns of tokens.
        box: area that the grid covers. It exceeds the image where the image was padded.
        lead: number of tokens before the grid that cover no pixels (a class token).
        row_end: number of tokens after each row that cover no pixels (marks).
    """

    rows: int
    columns: int
    box: Box
    lead: int = 0
    row_end: int = 0

    @property
    def tokens(self) -> int:
        """Number of visual tokens in the view."""
        return self.lead + self.rows * (self.columns + self.row_end)

    def boxes(self, size: Size) -> list[Box | None]:
        """Return the box of each token in an image of ``size``, in order; None if it covers no pixels."""
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
    """Return the views of each image, in the order of their tokens.

    Args:
        config: config of the model.
        processor: the processor that produced the inputs, or its image processor.
        inputs: the processor's output.
        sizes: width and height of the images, in the order of the prompts.
        visual: number of visual tokens in all prompts.

    Raises:
        UnsupportedModelError: the geometry of this family, or of these settings, is not known.
        InputError: the views and the prompts have different numbers of visual tokens.
    """
    geometry = family_of(config).geometry
    if geometry is None:
        known = [name for name, family in FAMILIES.items() if family.geometry]
        raise UnsupportedModelError(
            f"the pixels of each visual token are not known for {config.model_type}, only for "
            f"{', '.join(known)}",
            "the pixels of its visual tokens are not known",
        )
    image_processor = getattr(processor, "image_processor", processor)
    cut = _Cut(config, image_processor, inputs, visual // max(len(sizes), 1))
    views = [_CUTS[geometry](cut, number, size) for number, size in enumerate(sizes)]
    found = sum(view.tokens for image in views for view in image)
    if found != visual:
        raise InputError(
            f"this {type(image_processor).__name__} cuts images of {list(sizes)} pixels into {found} visual "
            f"tokens, but the prompt has {visual}: pass the output of this processor without other settings, "
            "and the sizes of the images that it processed"
        )
    return views


@dataclass(frozen=True)
class _Cut:
    """One call of a processor; ``each`` is the mean number of visual tokens of an image."""

    config: Any
    image_processor: Any
    inputs: Mapping[str, torch.Tensor]
    each: int

    @property
    def patch(self) -> int:
        return int(self.config.vision_config.patch_size)

    @property
    def tower(self) -> int:
        """Side of the tower's square input in pixels; some configs give it as a pair."""
        side = self.config.vision_config.image_size
        return int(side if isinstance(side, int) else side[0])

    def square(self, number: int, size: Size) -> tuple[View, ...]:
        height, width = self.inputs["pixel_values"].shape[-2:]
        box = _cropped(self.image_processor, size, (width, height))
        side = isqrt(self.each)
        # If the size is no multiple of the patch size, the tower ignores a rim at the right and bottom.
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
        # The image is in the middle of the canvas. Whole rows or columns of padding are removed.
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
    """Tiles of ``side`` × ``side`` tokens row by row, then the whole image; a single tile is only that."""
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


def _cropped(settings: Any, size: Size, output: Size) -> Box:
    """The part of an image that padding, resizing and cropping turn into ``output`` pixels."""
    width, height = size
    left = top = 0.0
    if getattr(settings, "do_pad", False):
        left, top = -((max(size) - width) // 2), -((max(size) - height) // 2)
        width = height = max(size)
    resized = _resized(settings, (width, height)) if settings.do_resize else (width, height)
    cropped = resized
    if getattr(settings, "do_center_crop", False):
        cropped = settings.crop_size["width"], settings.crop_size["height"]
    if cropped != output:
        raise UnsupportedModelError(
            f"{type(settings).__name__} turned an image of {size} pixels into {output}, but its settings say "
            f"{cropped}: the pixels of each visual token are not known",
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
    target = {name: value for name, value in dict(settings.size).items() if value}
    if target.keys() == {"height", "width"}:
        return target["width"], target["height"]
    if target.keys() == {"shortest_edge"}:
        short, edge = min(size), target["shortest_edge"]
        width, height = (edge if side == short else int(edge * side / short) for side in size)
        return width, height
    raise UnsupportedModelError(
        f"{type(settings).__name__} has size={target}: how it resizes images is not known",
        "the image processor's settings are not known",
    )


def _whole(size: Size) -> Box:
    return 0.0, 0.0, float(size[0]), float(size[1])


def _part(box: Box, fractions: Box) -> Box:
    """The part of a box that ``fractions`` of its width and height describe."""
    left, top, right, bottom = box
    x0, y0, x1, y1 = fractions
    width, height = right - left, bottom - top
    return left + x0 * width, top + y0 * height, left + x1 * width, top + y1 * height


def _within(box: Box, size: Size) -> Box | None:
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[2], float(size[0])), min(box[3], float(size[1]))
    return (left, top, right, bottom) if left < right and top < bottom else None
