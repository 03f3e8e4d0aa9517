"""The settings of one image, as a tensor that vLLM sends from the request's process to the worker."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from skipvision.config import SkipConfig

FIELD = "skip_vision"
"""Name of the tensor among an image's multimodal keyword arguments."""
_STEP = 256
"""Sizes of tensors are multiples of it, so that those of several images usually stack."""


@dataclass(frozen=True)
class ImageSettings:
    """An image's settings for the worker.

    Attributes:
        tokens: N, visual tokens that the model's encoder returns.
        config: applied to the image.
    """

    tokens: int
    config: SkipConfig

    @property
    def kept(self) -> int:
        """Tokens of the image in the prompt."""
        return self.config.counts(self.tokens).total

    @property
    def is_full(self) -> bool:
        """Whether every token is retained, and no summary is added."""
        return self.config.counts(self.tokens) == (self.tokens, 0, 0)

    @property
    def span(self) -> int:
        """Position ids that the image takes where tokens have one: those after it continue from there."""
        return self.tokens if self.config.positions == "original" else self.kept

    def as_tensor(self) -> torch.Tensor:
        """Return the settings as (bytes,) uint8: JSON, padded with spaces."""
        text = json.dumps({"tokens": self.tokens, "config": self.config.model_dump()}).encode()
        padded = text.ljust(-len(text) % _STEP + len(text))
        return torch.frombuffer(bytearray(padded), dtype=torch.uint8)

    @staticmethod
    def from_tensor(values: torch.Tensor) -> ImageSettings:
        """Read the settings from a tensor of `as_tensor`."""
        return _parsed(values.cpu().numpy().tobytes())


def from_tensors(values: Iterable[torch.Tensor]) -> list[ImageSettings]:
    """Read the settings of several images: a stacked tensor, or a list of tensors."""
    return [ImageSettings.from_tensor(image) for image in values]


@lru_cache(maxsize=1024)
def _parsed(text: bytes) -> ImageSettings:
    values = json.loads(text)
    return ImageSettings(values["tokens"], SkipConfig(**values["config"]))
