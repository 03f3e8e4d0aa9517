"""Synthetic images in the form that each family's image processor returns, for measuring and testing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

SIDE = 32
"""Side in pixels of the image that towers of a fixed size take."""

SCALES = {"small image": 0, "image": 1, "large image": 2}
"""Row parts that are images, and the scale of each."""


@dataclass(frozen=True)
class Request:
    """One image to generate.

    Attributes:
        config: the model's config.
        scale: 0 (small), 1 or 2 (large).
        company: images in its row, including itself.
        random: the image's own random generator.
        dtype: dtype of its pixels.
        grid: rows and columns of visual tokens in a family that keeps the size of images; None = by scale.
    """

    config: PretrainedConfig
    scale: int
    company: int
    random: torch.Generator
    dtype: torch.dtype
    grid: tuple[int, int] | None = None

    @property
    def vision(self) -> Any:
        """The config of the vision tower."""
        names = ("vision_config", "vq_config")
        return next((getattr(self.config, name) for name in names if hasattr(self.config, name)), self.config)

    @property
    def side(self) -> int:
        """Side in pixels of the images that the tower takes."""
        return _first(self.vision, "image_size", default=SIDE)

    @property
    def channels(self) -> int:
        return _first(self.vision, "num_channels", "in_channels", default=3)

    def draw(self, *shape: int) -> torch.Tensor:
        """Draw normally distributed pixels, the same in every dtype."""
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def pixels(self, count: int, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Draw pixels (count, channels, height, width), by default of the tower's size."""
        return self.draw(count, self.channels, height or self.side, width or self.side)


@dataclass(frozen=True)
class SyntheticImage:
    """One image as the processor returns it.

    Attributes:
        inputs: keyword arguments of the model, each of shape (1 or more, …).
        segments: number of equal runs of its placeholders (tiles, or rows of the image).
    """

    inputs: dict[str, torch.Tensor]
    segments: int = 1


Recipe = Callable[[Request], SyntheticImage]


def one_size(request: Request) -> SyntheticImage:
    """Resize every image to the tower's size."""
    return SyntheticImage({"pixel_values": request.pixels(1)})


def one_size_of_64_pixels(request: Request) -> SyntheticImage:
    """Resize every image to a square whose tokens have 64 pixels on each side."""
    side = 64 * math.isqrt(request.config.image_seq_length)
    return SyntheticImage({"pixel_values": request.pixels(1, side, side)})


def tiles_by_image(request: Request) -> SyntheticImage:
    """Two tiles of each image, and a view of the whole image; batches are (image, tile, …)."""
    side = request.vision.model_args["img_size"][0]
    return SyntheticImage({"pixel_values": request.pixels(3, side, side)[None]})


def tiles(request: Request) -> SyntheticImage:
    """Cut an image into tiles of the tower's size, and add a view of the whole image."""
    count = (1, 3, 5)[request.scale]
    return SyntheticImage({"pixel_values": request.pixels(count)}, segments=count)


def tiles_by_row(request: Request) -> SyntheticImage:
    """Like `tiles`, each with a pixel mask; batches are (row, tile, …)."""
    image = tiles(request)
    mask = torch.ones_like(image.inputs["pixel_values"][:, 0], dtype=torch.long)
    return SyntheticImage({**image.inputs, "pixel_attention_mask": mask}, image.segments)


def flagged_tiles_by_row(request: Request) -> SyntheticImage:
    """Like `tiles`, each with a flag; batches are (row, tile, …)."""
    image = tiles(request)
    flags = torch.ones(image.segments, dtype=torch.bool)
    return SyntheticImage({**image.inputs, "pixel_attention_mask": flags}, image.segments)


def any_resolution(request: Request) -> SyntheticImage:
    """The whole image and tiles of its best resolution, with its original size."""
    side = request.side
    size = ((side + 8, side), (side - 8, 2 * side), (2 * side, 2 * side))[request.scale]
    count = 1 + (2, 2, 4)[request.scale]
    pixels = request.pixels(count)[None]
    return SyntheticImage({"pixel_values": pixels, "image_sizes": torch.tensor([size])})


def any_resolution_when_alone(request: Request) -> SyntheticImage:
    """Like `any_resolution`, but several images in one row are not cut into tiles."""
    inputs = any_resolution(request).inputs
    pixels = inputs["pixel_values"] if request.company == 1 else inputs["pixel_values"][:, :1]
    return SyntheticImage(
        {**inputs, "pixel_values": pixels, "batch_num_images": torch.tensor([request.company])}
    )


def native_size(request: Request) -> SyntheticImage:
    """Images keep their shape and are padded to the largest of the batch."""
    unit = _first(request.vision, "patch_size", default=8) * _first(request.config, "spatial_merge_size")
    rows, columns = _grid(request)
    size = (rows * unit, columns * unit)
    inputs = {"pixel_values": request.pixels(1, *size), "image_sizes": torch.tensor([size])}
    return SyntheticImage(inputs, segments=rows)


def patches(request: Request) -> SyntheticImage:
    """Flattened patches of all images in one sequence, with each image's grid (t, h, w)."""
    vision, (rows, columns) = request.vision, _grid(request)
    merge = _first(vision, "spatial_merge_size", "merge_size", "merge_kernel_size")
    grid = torch.tensor([[1, rows * merge, columns * merge]])
    frames = _first(vision, "temporal_patch_size", "patch_temporal")
    width = frames * request.channels * vision.patch_size**2
    return SyntheticImage({"pixel_values": request.draw(int(grid.prod()), width), "image_grid_thw": grid})


def square_patches(request: Request) -> SyntheticImage:
    """Like `patches`, but each patch is (channels, height, width)."""
    image, side = patches(request), request.vision.patch_size
    squares = image.inputs["pixel_values"].unflatten(1, (-1, side, side))
    return SyntheticImage({**image.inputs, "pixel_values": squares})


def patches_and_merge(request: Request) -> SyntheticImage:
    """Like `patches`, with the number of patches along a side that become one token."""
    return SyntheticImage({**patches(request).inputs, "image_merge_sizes": torch.tensor([1])})


def padded_patches(request: Request) -> SyntheticImage:
    """Flattened patches of each image, padded to the largest of the batch, with its (h, w)."""
    rows, columns = (side * request.config.downsample_factor for side in _grid(request))
    pixels = request.draw(1, rows * columns, request.channels * request.vision.patch_size**2)
    mask = torch.ones(1, rows * columns, dtype=torch.int32)
    shapes = torch.tensor([[rows, columns]])
    return SyntheticImage({"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes})


def patches_of_tokens(request: Request) -> SyntheticImage:
    """One patch (height, width, channels) per token, with each image's grid (t, h, w)."""
    rows, columns = _grid(request)
    side = request.vision.patch_size * request.vision.spatial_merge_size
    pixels = request.draw(rows * columns, side, side, request.channels)
    return SyntheticImage({"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])})


def patches_alone(request: Request) -> SyntheticImage:
    """One patch (frames, height, width, channels) per token, without a grid."""
    rows, columns = _grid(request)
    side, frames = request.vision.patch_size, request.vision.temporal_patch_size
    return SyntheticImage(
        {"pixel_values": request.draw(rows * columns, frames, side, side, request.channels)}
    )


def positioned_patches(request: Request) -> SyntheticImage:
    """Flattened patches of each image, padded to the largest of the batch, with each patch's (x, y)."""
    pool = _first(request.vision, "pooling_kernel_size")
    rows, columns = (side * pool for side in _grid(request))
    pixels = request.draw(1, rows * columns, request.channels * request.vision.patch_size**2)
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return SyntheticImage({"pixel_values": pixels, "image_position_ids": positions[None]})


def positioned_tokens(request: Request) -> SyntheticImage:
    """Like `positioned_patches`, with the patches of a token joined into one."""
    rows, columns = _grid(request)
    side = request.vision.patch_size * request.vision.pooling_kernel_size
    pixels = request.draw(1, rows * columns, request.channels * side**2)
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return SyntheticImage({"pixel_values": pixels, "image_position_ids": positions[None]})


def patches_in_rows(request: Request) -> SyntheticImage:
    """Flattened patches of all images in one sequence; the prompt marks their rows."""
    rows, columns = _grid(request)
    pixels = request.draw(rows * columns, request.channels * request.vision.patch_size**2)
    return SyntheticImage({"pixel_values": pixels}, segments=rows)


def strip(request: Request) -> SyntheticImage:
    """Adjacent patches in one strip for the whole batch, with each image's (h, w)."""
    merged = 2 if getattr(request.config, "downsample_mode", None) == "4x" else 4
    rows, columns = (merged * side for side in _grid(request))
    side = request.vision.patch_size
    pixels = request.draw(rows * columns * side, request.channels, side)
    return SyntheticImage(
        {"pixel_values": pixels, "target_sizes": torch.tensor([[rows, columns]], dtype=torch.int32)}
    )


def patches_with_height_and_width(request: Request) -> SyntheticImage:
    """Flattened patches of all images in one sequence, with each image's grid (h, w)."""
    rows, columns = (2 * side for side in _grid(request))
    pixels = request.draw(rows * columns, request.channels * request.vision.patch_size**2)
    return SyntheticImage({"pixel_values": pixels, "image_grid_hw": torch.tensor([[rows, columns]])})


def one_size_and_mask(request: Request) -> SyntheticImage:
    """Every image at the tower's size, with a pixel mask."""
    pixels = request.pixels(1)
    return SyntheticImage({"pixel_values": pixels, "pixel_mask": torch.ones_like(pixels[:, 0]).bool()})


def one_size_by_row(request: Request) -> SyntheticImage:
    """Every image at the tower's size with a pixel mask; batches are (row, image, …)."""
    pixels = request.pixels(1)
    return SyntheticImage(
        {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, 0]).long()}
    )


def one_size_next_to_videos(request: Request) -> SyntheticImage:
    """Every image at the tower's size, named apart from videos (transformers before 5.21)."""
    return SyntheticImage({"pixel_values_images": request.pixels(1)})


def one_size_and_question(request: Request) -> SyntheticImage:
    """Every image at the tower's size, with a question about it."""
    question = torch.arange(1, 5)[None]
    inputs = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    return SyntheticImage({**one_size(request).inputs, **inputs})


def pooled_patches(request: Request) -> SyntheticImage:
    """Flattened patches of the whole image and of its tiles, and the four that each token pools."""
    side = request.side // request.vision.patch_size
    count = 1 + (1, 2, 4)[request.scale]
    pixels = request.draw(count, side**2, request.channels * request.vision.patch_size**2)
    positions = torch.arange(count * side**2).view(count, side // 2, 2, side // 2, 2)
    pooling = positions.transpose(2, 3).reshape(-1, 4)
    rows, columns = side // 2, (count - 1) * side // 2
    return SyntheticImage(
        {
            "pixel_values": pixels,
            "image_token_pooling": pooling,
            "image_grids": torch.tensor([[side // 2, side // 2, rows, columns]]),
            "image_num_crops": torch.tensor([count]),
        }
    )


def two_resolutions(request: Request) -> SyntheticImage:
    """Each image twice, for a low-resolution and a high-resolution tower."""
    side = request.config.high_res_vision_config.image_size
    high = request.pixels(1, side, side)
    return SyntheticImage({**one_size(request).inputs, "high_res_pixel_values": high})


def _first(config: Any, *names: str, default: int = 1) -> int:
    """Return the first of these sizes that the config has."""
    size = next((getattr(config, name) for name in names if hasattr(config, name)), default)
    return size if isinstance(size, int) else size[0]


def _grid(request: Request) -> tuple[int, int]:
    """Return rows and columns of visual tokens in a family that keeps the size of images."""
    return request.grid or ((2, 4), (4, 4), (4, 6))[request.scale]


RECIPES: dict[str, Recipe] = {
    "aria": one_size_and_mask,
    "aya_vision": tiles,
    "cohere2_vision": tiles,
    "deepseek_vl_hybrid": two_resolutions,
    "emu3": native_size,
    "fast_vlm": one_size_of_64_pixels,
    "fuyu": patches_in_rows,
    "gemma4": positioned_patches,
    "gemma4_unified": positioned_tokens,
    "granite4_vision": any_resolution,
    "granite_docling": flagged_tiles_by_row,
    "idefics2": one_size_by_row,
    "idefics3": tiles_by_row,
    "inkling2": patches_of_tokens,
    "inkling_mm_model": patches_alone,
    "instructblip": one_size_and_question,
    "internvl": tiles,
    "kimi_k25": square_patches,
    "lfm2_vl": padded_patches,
    "lighton_ocr": native_size,
    "llama4": tiles,
    "llava_next": any_resolution,
    "llava_next_video": any_resolution,
    "llava_onevision": any_resolution_when_alone,
    "minicpm_ocr": strip,
    "minicpmv4_6": strip,
    "minicpmv4_7": strip,
    "mistral3": native_size,
    "mistral_large4": native_size,
    "molmo2": pooled_patches,
    "nemotron_h_omni": patches_with_height_and_width,
    "ovis2": tiles,
    "paddleocr_vl": square_patches,
    "perception_lm": tiles_by_image,
    "qianfan_ocr": tiles,
    "smolvlm": tiles_by_row,
    "video_llama_3": patches_and_merge,
}
"""The recipe of a family by its model_type; `recipe_of` covers the others."""


def recipe_of(model_type: str, arguments: Container[str]) -> Recipe:
    """Return the family's recipe: by default `patches` if the model takes image grids, else `one_size`."""
    if "pixel_values_images" in arguments:
        return one_size_next_to_videos
    return RECIPES.get(model_type, patches if "image_grid_thw" in arguments else one_size)


BY_ROW = {"granite_docling", "idefics2", "idefics3", "smolvlm"}
"""Families that take (row, image, …) instead of all images in one dimension."""

IN_A_STRIP = {"minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}
"""Families that take (1, channels, height, all widths) instead of all images in one dimension."""

ONE_A_ROW = {"blip-2", "instructblip"}
"""Families that need an image and, in `generate`, allow one per row."""

ONCE_A_ROW = {"batch_num_images"}
"""Inputs that have one entry per row with images, instead of one per image."""

INTO_PIXELS = {"image_token_pooling"}
"""Inputs that index the patches of all images."""

FILLERS = {"image_position_ids": -1}
"""Padding values of smaller images, where they are not 0."""


def collate(model_type: str, rows: Sequence[Sequence[SyntheticImage]]) -> dict[str, torch.Tensor]:
    """Return the vision inputs of a batch: those of its images concatenated, smaller ones padded."""
    first = next((image for row in rows for image in row), None)
    if first is None:
        return {}
    none = {name: value[:0] for name, value in first.inputs.items()}
    grouped = [_concatenate([none, *(image.inputs for image in row)]) for row in rows]
    for row in grouped:
        row.update({name: row[name][:1] for name in ONCE_A_ROW & row.keys()})
    if model_type in BY_ROW:
        grouped = [{name: value[None] for name, value in row.items()} for row in grouped]
    joined = _concatenate(grouped)
    if model_type in IN_A_STRIP:
        joined["pixel_values"] = joined["pixel_values"].permute(1, 2, 0)[None]
    return joined


def _concatenate(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    collected: dict[str, list[torch.Tensor]] = defaultdict(list)
    for part in parts:
        before = sum(pixels.shape[:2].numel() for pixels in collected.get("pixel_values", []))
        for name, value in part.items():
            collected[name].append(value + before if name in INTO_PIXELS else value)
    joined = {}
    for name, values in collected.items():
        largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        joined[name] = torch.cat([_pad(value, largest, FILLERS.get(name, 0)) for value in values])
    return joined


def _pad(value: torch.Tensor, sizes: list[int], filler: int) -> torch.Tensor:
    """Pad all but the first dimension."""
    missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
    return F.pad(value, [amount for more in reversed(missing) for amount in (0, more)], value=filler)
