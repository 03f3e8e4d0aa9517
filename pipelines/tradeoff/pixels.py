"""Downscaled pixels: the baseline that makes the image itself smaller.

A tower with learned positions has one image size. Positions that are interpolated to a smaller grid
(``interpolate_pos_encoding`` of transformers) let it read a smaller image, with fewer patches and so fewer
visual tokens. Neither tower nor projector was trained on such images.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

import skipvision as sv
from pipelines.engines.loading import empty_model, load_base, load_processor
from pipelines.shared.console import say
from pipelines.tradeoff.config import PIXELS
from skipvision.cost import units
from skipvision.cost.running import Design
from skipvision.errors import ConfigError

PIXELS_WITH_TOWER = f"{PIXELS}, tower counted"
"""The largest image within all FLOPs of Skip-Vision at a budget; `PIXELS` is within those after the tower."""

_INTERPOLATE = "interpolate_pos_encoding"


@dataclass(frozen=True)
class Costs:
    """Ratios to full tokens: predicted prefill FLOPs after the tower and in all, and KV bytes."""

    language_flops: float
    prefill_flops: float
    kv_bytes: float


class ImageSizes:
    """The sizes of a square image that a tower of one size can read with interpolated positions.

    Args:
        model: config of the base model.
        text_tokens: prompt tokens that are not visual.

    Attributes:
        text_tokens: as given.
        patch: side of a patch in pixels.
        patches: patches in a row of an image of the tower's own size.

    Raises:
        ConfigError: the tower does not have one size, or cannot interpolate its positions.
    """

    def __init__(self, model: PretrainedConfig, text_tokens: int) -> None:
        vision: Any = getattr(model, "vision_config", None)
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        self._model, self.text_tokens = model, text_tokens
        unsuitable = ConfigError(
            f"{PIXELS}: {model.model_type} does not read images of one size with one token per patch"
        )
        if not (isinstance(size, int) and isinstance(patch, int)):
            raise unsuitable
        self._full = sv.predict_cost(model, None, text_tokens=text_tokens)
        if self._full.sequence - text_tokens != (size // patch) ** 2:
            raise unsuitable
        _embeddings(empty_model(model))
        self.patch, self.patches = patch, size // patch

    def costs(self, side: int) -> Costs:
        """Return the costs of an image of ``side`` pixels."""
        full, own = self._full, self._decoder_cost(side)
        tower, _ = units.images(Design.of(self.resized(side)), 1, None)
        return Costs(
            self._language_flops(side),
            (own.prefill_flops - own.vision_flops + tower) / full.prefill_flops,
            own.kv_bytes / full.kv_bytes,
        )

    def tokens(self, side: int) -> int:
        """Return the number of visual tokens of an image of ``side`` pixels."""
        return (side // self.patch) ** 2

    def check(self, side: int) -> None:
        """Raise `ConfigError` if ``side`` is not a whole number of patches, or larger than the tower's."""
        if side % self.patch or not 0 < side <= self.patch * self.patches:
            raise ConfigError(
                f"pixel_sides: {side} is not a multiple of the patch size {self.patch}, up to "
                f"{self.patch * self.patches}"
            )

    def within(self, fraction: float, other: sv.SkipConfig | None) -> Iterator[tuple[str, int]]:
        """Yield (method, side) of the largest images within a budget, counted without and with the tower.

        Args:
            fraction: share of the full prefill FLOPs after the tower.
            other: Skip-Vision at this budget; the budget with the tower is what it spends. None = none.
        """
        yield from self._largest(PIXELS, self._language_flops, fraction)
        if other is not None:
            spent = sv.predict_cost(self._model, other, text_tokens=self.text_tokens)
            total = spent.ratio_to_full.prefill_flops
            yield from self._largest(PIXELS_WITH_TOWER, lambda side: self.costs(side).prefill_flops, total)

    def _largest(self, method: str, cost: Callable[[int], float], limit: float) -> Iterator[tuple[str, int]]:
        """Yield the method with its largest image within a limit; costs grow with the side."""
        low, high = 0, self.patches
        while low < high:
            middle = (low + high + 1) // 2
            fits = cost(middle * self.patch) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            yield method, low * self.patch
        else:
            say(f"{method}: an image of one patch costs more than {limit:.1%} of the full prefill")

    def _language_flops(self, side: int) -> float:
        full, own = self._full, self._decoder_cost(side)
        return (own.prefill_flops - own.vision_flops) / (full.prefill_flops - full.vision_flops)

    def _decoder_cost(self, side: int) -> sv.Cost:
        """Return the cost of a prompt whose FLOPs in the tower are only in proportion to its tokens."""
        tokens = self.tokens(side)
        return sv.predict_cost(self._model, None, text_tokens=self.text_tokens, visual_tokens=tokens)

    def resized(self, side: int) -> PretrainedConfig:
        """Return the config of the model that reads images of ``side`` pixels."""
        smaller: Any = copy.deepcopy(self._model)
        smaller.vision_config.image_size = side
        if hasattr(smaller, "image_seq_length"):
            smaller.image_seq_length = self.tokens(side)
        return smaller


def accept_smaller_images(model: nn.Module) -> None:
    """Let a model's tower interpolate its positions; images of its own size are encoded as before.

    Raises:
        ConfigError: the tower cannot do that.
    """
    for module in _embeddings(model):
        module.register_forward_pre_hook(_interpolated, with_kwargs=True)


def _interpolated(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, _INTERPOLATE: True}


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the modules that add positions to patches."""
    found = [
        module
        for module in model.modules()
        if hasattr(module, _INTERPOLATE) and _INTERPOLATE in inspect.signature(module.forward).parameters
    ]
    if not found:
        raise ConfigError(f"{PIXELS}: the model's tower cannot interpolate the positions of its patches")
    return found


def with_side(processor: Any, side: int) -> Any:
    """Return a processor that resizes images to ``side`` × ``side`` pixels and is the same otherwise."""
    smaller = copy.copy(processor)
    smaller.image_processor = copy.deepcopy(processor.image_processor)
    images, square = smaller.image_processor, {"height": side, "width": side}
    sizes = type(images.size)
    images.size = sizes(shortest_edge=side) if "shortest_edge" in images.size else sizes(**square)
    if getattr(images, "crop_size", None) is not None:
        images.crop_size = sizes(**square)
    return smaller


def save_with_side(path: str, side: int, folder: str | Path) -> None:
    """Save a base model, with its processor, that reads images of ``side`` × ``side`` pixels.

    Its positions are interpolated once, so it computes what the model at ``path`` does with smaller images,
    and an adapter that was fine-tuned on one runs on the other. Give both folders the same name.

    Raises:
        ConfigError: the tower cannot interpolate its positions, or does not have one size.
    """
    model: Any = load_base(path, None, "sdpa", torch.device("cpu"))
    sizes = ImageSizes(model.config, 0)
    sizes.check(side)
    for module in _embeddings(model):
        embeddings: Any = module
        positions = embeddings.position_embedding
        added = positions.num_embeddings - sizes.patches**2  # a class token
        patches = torch.empty(1, sizes.tokens(side) + added, positions.embedding_dim)
        with torch.no_grad():
            smaller = embeddings.interpolate_pos_encoding(patches, side, side)[0]
            embeddings.position_embedding = nn.Embedding(len(smaller), smaller.shape[1], dtype=smaller.dtype)
            embeddings.position_embedding.weight.copy_(smaller)
    model.config = sizes.resized(side)
    model.save_pretrained(folder)
    with_side(load_processor(path), side).save_pretrained(folder)
