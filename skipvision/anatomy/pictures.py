"""How the families' image processors hand over pictures."""

from __future__ import annotations

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
"""Row parts that stand for a picture, and how large it is."""


@dataclass(frozen=True)
class Request:
    """One picture to make.

    Attributes:
        config: of the model.
        scale: 0 (small), 1 or 2 (large).
        company: pictures in its row, itself included.
        random: this picture's own stream of random numbers.
        dtype: of its pixels.
        grid: rows and columns of visual tokens where the family keeps a picture's size; by default as
            the scale says.
    """

    config: PretrainedConfig
    scale: int
    company: int
    random: torch.Generator
    dtype: torch.dtype
    grid: tuple[int, int] | None = None

    @property
    def vision(self) -> Any:
        """What describes the tower."""
        names = ("vision_config", "vq_config")
        return next((getattr(self.config, name) for name in names if hasattr(self.config, name)), self.config)

    @property
    def side(self) -> int:
        """Of the pictures that the tower is made for."""
        return _first(self.vision, "image_size", default=SIDE)

    @property
    def channels(self) -> int:
        return _first(self.vision, "num_channels", "in_channels", default=3)

    def draw(self, *shape: int) -> torch.Tensor:
        """Normally distributed pixels, the next ones of the stream; the same ones in every dtype."""
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def pixels(self, count: int, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """(count, channels, height, width), by default the size that the tower is made for."""
        return self.draw(count, self.channels, height or self.side, width or self.side)


@dataclass(frozen=True)
class Picture:
    """One picture as the processor hands it over.

    Attributes:
        inputs: keyword arguments of the model, each of shape (1 or more, …).
        segments: how many equal runs its placeholders are cut into (tiles, or rows of the picture).
    """

    inputs: dict[str, torch.Tensor]
    segments: int = 1


Recipe = Callable[[Request], Picture]


def one_size(request: Request) -> Picture:
    """Every picture is resized to the tower's size."""
    return Picture({"pixel_values": request.pixels(1)})


def tiles(request: Request) -> Picture:
    """A picture is cut into tiles of the tower's size, and shown once more as a whole."""
    count = (1, 3, 5)[request.scale]
    return Picture({"pixel_values": request.pixels(count)}, segments=count)


def tiles_by_row(request: Request) -> Picture:
    """Like `tiles`, each with a mask of its pixels; a batch's are (row, tile, …)."""
    picture = tiles(request)
    mask = torch.ones_like(picture.inputs["pixel_values"][:, 0], dtype=torch.long)
    return Picture({**picture.inputs, "pixel_attention_mask": mask}, picture.segments)


def flagged_tiles_by_row(request: Request) -> Picture:
    """Like `tiles`, each with a flag; a batch's are (row, tile, …)."""
    picture = tiles(request)
    flags = torch.ones(picture.segments, dtype=torch.bool)
    return Picture({**picture.inputs, "pixel_attention_mask": flags}, picture.segments)


def any_resolution(request: Request) -> Picture:
    """The whole picture and tiles of its best resolution, with its original size."""
    side = request.side
    size = ((side + 8, side), (side - 8, 2 * side), (2 * side, 2 * side))[request.scale]
    count = 1 + (2, 2, 4)[request.scale]
    pixels = request.pixels(count)[None]
    return Picture({"pixel_values": pixels, "image_sizes": torch.tensor([size])})


def any_resolution_when_alone(request: Request) -> Picture:
    """Like `any_resolution`; several pictures in one row are not cut into tiles."""
    inputs = any_resolution(request).inputs
    pixels = inputs["pixel_values"] if request.company == 1 else inputs["pixel_values"][:, :1]
    return Picture({**inputs, "pixel_values": pixels, "batch_num_images": torch.tensor([request.company])})


def native_size(request: Request) -> Picture:
    """Pictures keep their shape and are padded to the batch's largest."""
    unit = _first(request.vision, "patch_size", default=8) * _first(request.config, "spatial_merge_size")
    rows, columns = _grid(request)
    size = (rows * unit, columns * unit)
    inputs = {"pixel_values": request.pixels(1, *size), "image_sizes": torch.tensor([size])}
    return Picture(inputs, segments=rows)


def patches(request: Request) -> Picture:
    """Flattened patches of all pictures in one row of vectors, with each picture's grid (t, h, w)."""
    vision, (rows, columns) = request.vision, _grid(request)
    merge = _first(vision, "spatial_merge_size", "merge_size", "merge_kernel_size")
    grid = torch.tensor([[1, rows * merge, columns * merge]])
    frames = _first(vision, "temporal_patch_size", "patch_temporal")
    width = frames * request.channels * vision.patch_size**2
    return Picture({"pixel_values": request.draw(int(grid.prod()), width), "image_grid_thw": grid})


def square_patches(request: Request) -> Picture:
    """Like `patches`, but each patch is (channels, height, width)."""
    picture, side = patches(request), request.vision.patch_size
    squares = picture.inputs["pixel_values"].unflatten(1, (-1, side, side))
    return Picture({**picture.inputs, "pixel_values": squares})


def patches_and_merge(request: Request) -> Picture:
    """Like `patches`, and how many of them, along a side, become one token."""
    return Picture({**patches(request).inputs, "image_merge_sizes": torch.tensor([1])})


def padded_patches(request: Request) -> Picture:
    """Flattened patches of each picture, padded to the batch's largest, with its (h, w)."""
    rows, columns = (side * request.config.downsample_factor for side in _grid(request))
    pixels = request.draw(1, rows * columns, request.channels * request.vision.patch_size**2)
    mask = torch.ones(1, rows * columns, dtype=torch.int32)
    shapes = torch.tensor([[rows, columns]])
    return Picture({"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes})


def patches_of_tokens(request: Request) -> Picture:
    """One patch (height, width, channels) a token, with each picture's grid (t, h, w)."""
    rows, columns = _grid(request)
    side = request.vision.patch_size * request.vision.spatial_merge_size
    pixels = request.draw(rows * columns, side, side, request.channels)
    return Picture({"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])})


def patches_alone(request: Request) -> Picture:
    """One patch (frames, height, width, channels) a token, and nothing beside it."""
    rows, columns = _grid(request)
    side, frames = request.vision.patch_size, request.vision.temporal_patch_size
    return Picture({"pixel_values": request.draw(rows * columns, frames, side, side, request.channels)})


def positioned_patches(request: Request) -> Picture:
    """Flattened patches of each picture, padded to the batch's largest, with each patch's (x, y)."""
    pool = _first(request.vision, "pooling_kernel_size")
    rows, columns = (side * pool for side in _grid(request))
    pixels = request.draw(1, rows * columns, request.channels * request.vision.patch_size**2)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return Picture({"pixel_values": pixels, "image_position_ids": places[None]})


def positioned_tokens(request: Request) -> Picture:
    """Like `positioned_patches`, but the patches of one token come as one."""
    rows, columns = _grid(request)
    side = request.vision.patch_size * request.vision.pooling_kernel_size
    pixels = request.draw(1, rows * columns, request.channels * side**2)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
    return Picture({"pixel_values": pixels, "image_position_ids": places[None]})


def patches_in_rows(request: Request) -> Picture:
    """Flattened patches of all pictures in one row of vectors; the prompt tells their rows."""
    rows, columns = _grid(request)
    pixels = request.draw(rows * columns, request.channels * request.vision.patch_size**2)
    return Picture({"pixel_values": pixels}, segments=rows)


def strip(request: Request) -> Picture:
    """Patches side by side in one strip for the whole batch, with each picture's (h, w)."""
    rows, columns = (4 * side for side in _grid(request))
    side = request.vision.patch_size
    pixels = request.draw(rows * columns * side, request.channels, side)
    return Picture(
        {"pixel_values": pixels, "target_sizes": torch.tensor([[rows, columns]], dtype=torch.int32)}
    )


def patches_with_height_and_width(request: Request) -> Picture:
    """Flattened patches of all pictures in one row of vectors, with each picture's grid (h, w)."""
    rows, columns = (2 * side for side in _grid(request))
    pixels = request.draw(rows * columns, request.channels * request.vision.patch_size**2)
    return Picture({"pixel_values": pixels, "image_grid_hw": torch.tensor([[rows, columns]])})


def one_size_and_mask(request: Request) -> Picture:
    """Every picture at the tower's size, with a mask of its pixels."""
    pixels = request.pixels(1)
    return Picture({"pixel_values": pixels, "pixel_mask": torch.ones_like(pixels[:, 0]).bool()})


def one_size_by_row(request: Request) -> Picture:
    """Every picture at the tower's size with a mask of its pixels; a batch's are (row, picture, …)."""
    pixels = request.pixels(1)
    return Picture({"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, 0]).long()})


def one_size_and_question(request: Request) -> Picture:
    """Every picture at the tower's size, with what is asked about it."""
    question = torch.arange(1, 5)[None]
    asked = {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
    return Picture({**one_size(request).inputs, **asked})


def pooled_patches(request: Request) -> Picture:
    """Flattened patches of the whole picture and of its tiles, and the four that make up each token."""
    side = request.side // request.vision.patch_size
    count = 1 + (1, 2, 4)[request.scale]
    pixels = request.draw(count, side**2, request.channels * request.vision.patch_size**2)
    places = torch.arange(count * side**2).view(count, side // 2, 2, side // 2, 2)
    pooling = places.transpose(2, 3).reshape(-1, 4)
    rows, columns = side // 2, (count - 1) * side // 2
    return Picture(
        {
            "pixel_values": pixels,
            "image_token_pooling": pooling,
            "image_grids": torch.tensor([[side // 2, side // 2, rows, columns]]),
            "image_num_crops": torch.tensor([count]),
        }
    )


def two_resolutions(request: Request) -> Picture:
    """Each picture twice, for a tower of low and one of high resolution."""
    side = request.config.high_res_vision_config.image_size
    high = request.pixels(1, side, side)
    return Picture({**one_size(request).inputs, "high_res_pixel_values": high})


def _first(config: Any, *names: str, default: int = 1) -> int:
    """The first of these sizes that the config has."""
    size = next((getattr(config, name) for name in names if hasattr(config, name)), default)
    return size if isinstance(size, int) else size[0]


def _grid(request: Request) -> tuple[int, int]:
    """Rows and columns of visual tokens of a picture whose size the family keeps."""
    return request.grid or ((2, 4), (4, 4), (4, 6))[request.scale]


RECIPES: dict[str, Recipe] = {
    "aria": one_size_and_mask,
    "aya_vision": tiles,
    "cohere2_vision": tiles,
    "deepseek_vl_hybrid": two_resolutions,
    "emu3": native_size,
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
    "qianfan_ocr": tiles,
    "smolvlm": tiles_by_row,
    "video_llama_3": patches_and_merge,
}
"""How families take pictures, by model_type; the others as `recipe_of` says."""


def recipe_of(model_type: str, arguments: Container[str]) -> Recipe:
    """The family's recipe; a model that asks for image grids takes `patches`, any other `one_size`."""
    return RECIPES.get(model_type, patches if "image_grid_thw" in arguments else one_size)


BY_ROW = {"granite_docling", "idefics2", "idefics3", "smolvlm"}
"""Families that take (row, picture, …) instead of one picture after the other."""

IN_A_STRIP = {"minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}
"""Families that take (1, channels, height, all widths) instead of one picture after the other."""

ONE_A_ROW = {"blip-2", "instructblip"}
"""Families that cannot do without a picture, nor, in `generate`, with another one in the same row."""

ONCE_A_ROW = {"batch_num_images"}
"""Inputs that have one entry for a row with pictures, not one for a picture."""

INTO_PIXELS = {"image_token_pooling"}
"""Inputs that count the patches of all pictures."""

FILLERS = {"image_position_ids": -1}
"""What smaller pictures are padded with, where it is not 0."""


def collate(model_type: str, rows: Sequence[Sequence[Picture]]) -> dict[str, torch.Tensor]:
    """The vision inputs of a batch: the pictures' own, concatenated, smaller ones padded."""
    first = next((picture for row in rows for picture in row), None)
    if first is None:
        return {}
    none = {name: value[:0] for name, value in first.inputs.items()}
    grouped = [_concatenate([none, *(picture.inputs for picture in row)]) for row in rows]
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
        before = sum(pixels.shape[:2].numel() for pixels in collected["pixel_values"])
        for name, value in part.items():
            collected[name].append(value + before if name in INTO_PIXELS else value)
    joined = {}
    for name, values in collected.items():
        largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        joined[name] = torch.cat([_pad(value, largest, FILLERS.get(name, 0)) for value in values])
    return joined


def _pad(value: torch.Tensor, sizes: list[int], filler: int) -> torch.Tensor:
    """Grow all but the first dimension."""
    missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
    return F.pad(value, [amount for more in reversed(missing) for amount in (0, more)], value=filler)
