"""How the families' image processors hand over pictures, and how prompts frame their placeholders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig

from skipvision.tiny_configs import SIDE

SCALES = {"small image": 0, "image": 1, "large image": 2}
"""Row parts that stand for a picture, and how large it is."""


@dataclass(frozen=True)
class Request:
    """One picture to make.

    Attributes:
        config: of the model.
        scale: 0 (small), 1 or 2 (large).
        company: pictures in its row, itself included.
        draw: shape → normally distributed pixels, the next ones of this picture's own random stream.
    """

    config: PretrainedConfig
    scale: int
    company: int
    draw: Callable[..., torch.Tensor]

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

    def pixels(self, count: int, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """(count, channels, height, width), by default the size that the tower is made for."""
        return self.draw(count, self.channels, height or self.side, width or self.side)


@dataclass(frozen=True)
class Picture:
    """One picture as the processor hands it over.

    Attributes:
        inputs: keyword arguments of the model; a batch's are concatenated, smaller ones padded with zeros.
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


def any_resolution(request: Request) -> Picture:
    """The whole picture and tiles of its best resolution, with its original size."""
    side = request.side
    size = ((side + 8, side), (side - 8, 2 * side), (2 * side, 2 * side))[request.scale]
    count = 1 + (2, 2, 4)[request.scale]
    pixels = request.pixels(count)[None]
    return Picture({"pixel_values": pixels, "image_sizes": torch.tensor([size])})


def any_resolution_when_alone(request: Request) -> Picture:
    """Like `any_resolution`; several pictures in one row are not cut into tiles."""
    picture = any_resolution(request)
    if request.company > 1:
        picture.inputs["pixel_values"] = picture.inputs["pixel_values"][:, :1]
    picture.inputs["batch_num_images"] = torch.tensor([request.company])
    return picture


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


def one_size_by_row(request: Request) -> Picture:
    """Every picture at the tower's size with a mask of its pixels; a batch's are (row, picture, …)."""
    pixels = request.pixels(1)
    return Picture({"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, 0]).long()})


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
    return ((2, 4), (4, 4), (4, 6))[request.scale]


RECIPES: dict[str, Recipe] = {
    "gemma4": positioned_patches,
    "gemma4_unified": positioned_tokens,
    "fuyu": patches_in_rows,
    "emu3": native_size,
    "inkling2": patches_of_tokens,
    "inkling_mm_model": patches_alone,
    "minicpm_ocr": strip,
    "minicpmv4_6": strip,
    "minicpmv4_7": strip,
    "nemotron_h_omni": patches_with_height_and_width,
    "aya_vision": tiles,
    "cohere2_vision": tiles,
    "deepseek_vl_hybrid": two_resolutions,
    "idefics2": one_size_by_row,
    "idefics3": tiles_by_row,
    "internvl": tiles,
    "kimi_k25": square_patches,
    "lfm2_vl": padded_patches,
    "lighton_ocr": native_size,
    "llama4": tiles,
    "granite4_vision": any_resolution,
    "llava_next": any_resolution,
    "llava_next_video": any_resolution,
    "llava_onevision": any_resolution_when_alone,
    "mistral3": native_size,
    "mistral_large4": native_size,
    "ovis2": tiles,
    "paddleocr_vl": square_patches,
    "qianfan_ocr": tiles,
    "video_llama_3": patches_and_merge,
    "smolvlm": tiles_by_row,
}
"""How families take pictures, by model_type; the others as `recipe_of` says."""


def recipe_of(model_type: str, arguments: Container[str]) -> Recipe:
    """The family's recipe; a model that asks for image grids takes `patches`, any other `one_size`."""
    return RECIPES.get(model_type, patches if "image_grid_thw" in arguments else one_size)


BY_ROW = {"idefics2", "idefics3", "smolvlm"}
"""Families that take (row, picture, …) instead of one picture after the other."""

IN_A_STRIP = {"minicpm_ocr", "minicpmv4_6", "minicpmv4_7"}
"""Families that take (1, channels, height, all widths) instead of one picture after the other."""

TOKEN_TYPES = {
    "token_type_ids": ("image_token_id",),
    "mm_token_type_ids": ("image_token_id",),
    "moe_mm_token_type_ids": ("image_start_token_id", "image_token_id", "image_end_token_id"),
}
"""Inputs that tell (1) the tokens that these config fields name from all others (0)."""

ONE_TOKEN_TYPE = {"paligemma"}
"""Families whose token types tell prompt (0) from answer instead."""

ONCE_A_ROW = {"batch_num_images"}
"""Inputs that have one entry for a row with pictures, not one for a picture."""


FILLERS = {"image_position_ids": -1}
"""What smaller pictures are padded with, where it is not 0."""


def collate(model_type: str, rows: Sequence[Sequence[Picture]]) -> dict[str, torch.Tensor]:
    """The vision inputs of a batch."""
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
        for name, value in part.items():
            collected[name].append(value)
    joined = {}
    for name, values in collected.items():
        largest = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
        joined[name] = torch.cat([_pad(value, largest, FILLERS.get(name, 0)) for value in values])
    return joined


def _pad(value: torch.Tensor, sizes: list[int], filler: int) -> torch.Tensor:
    """Grow all but the first dimension."""
    missing = [size - have for size, have in zip(sizes, value.shape[1:], strict=True)]
    return F.pad(value, [amount for more in reversed(missing) for amount in (0, more)], value=filler)


@dataclass(frozen=True)
class Frame:
    """Tokens around a picture's placeholders: names of config fields, or of marks that have none.

    Attributes:
        before: ahead of the picture.
        lead: ahead of each segment.
        between: between two segments.
        after: behind the picture.
    """

    before: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.before + self.lead + self.between + self.after


_FAKE = Frame(lead=("fake", "place"), after=("fake",))

FRAMES: dict[str, Frame] = {
    "aya_vision": Frame(before=("start",), lead=("tile",), after=("end",)),
    "fuyu": Frame(between=("newline",), after=("newline", "beginning")),
    "idefics3": _FAKE,
    "internvl": Frame(before=("start",), after=("end",)),
    "llama4": Frame(before=("boi_token_index",), between=("separator",), after=("eoi_token_index",)),
    "mistral3": Frame(between=("break",), after=("end",)),
    "ovis2": Frame(
        before=("visual_indicator_token_ids.0",),
        between=("visual_indicator_token_ids.1",),
        after=("visual_indicator_token_ids.4",),
    ),
    "smolvlm": _FAKE,
}
"""How families frame a picture, by model_type; the others as `frame_of` says."""

PAIRS = {
    "vision_start_token_id": "vision_end_token_id",
    "image_start_token_id": "image_end_token_id",
    "boi_token_index": "eoi_token_index",
    "boi_token_id": "eoi_token_id",
}
"""Names under which configs keep the tokens that begin and end a picture."""


def frame_of(config: PretrainedConfig) -> Frame:
    """The family's frame; one whose config names tokens that begin and end a picture puts them there."""
    pairs = (Frame(before=(start,), after=(end,)) for start, end in PAIRS.items() if hasattr(config, start))
    return FRAMES.get(config.model_type) or next(pairs, Frame())
