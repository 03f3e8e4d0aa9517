"""Encoded images within limits: their size is read from the header, pixels are decoded later."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from PIL import Image

from pipelines.data.encoded import decode_base64, split_data_url, without_white_space
from pipelines.data.images import ImageError, OversizedImageError, decode, size_of
from serve.errors import MediaError
from serve.media.config import MediaConfig
from serve.media.urls import shortened

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedImage:
    """An image file whose header is within the limits.

    Attributes:
        data: the file.
        name: where it came from, for messages.
        size: width and height before EXIF rotation (pixels).
        config: limits for decoding.
    """

    data: bytes = field(repr=False)
    name: str
    size: tuple[int, int]
    config: MediaConfig

    @classmethod
    def read(cls, data: bytes, name: str, config: MediaConfig) -> EncodedImage:
        """Read the header of an image file. Raise `MediaError` if it is not an allowed image."""
        return cls(data, name, _checked(size_of, data, name, config), config)

    @classmethod
    def from_data_url(cls, url: str, config: MediaConfig) -> EncodedImage:
        """Read an image from a data URL. Raise `MediaError` if it is malformed or not an allowed image."""
        name = "in the data URL"
        kind, parameters, text = split_data_url(url)
        if parameters[-1:] != ["base64"]:
            raise MediaError(
                f"image {name}: write data:image/png;base64,… and not {shortened(url[:40])}",
                "media_url_invalid",
            )
        text = without_white_space(text)
        allowed = [f"image/{each.lower()}" for each in config.formats]
        # Some clients do not know the type. The format is read from the file in any case.
        known = kind in (*allowed, "image", "image/*") or (kind == "image/jpg" and "image/jpeg" in allowed)
        if not known:
            raise MediaError(
                f"image {name}: its type is {shortened(kind)}; allowed are {', '.join(allowed)}",
                "media_format",
            )
        check_bytes(len(text) * 3 // 4 - text[-2:].count("="), name, config)
        try:
            data = decode_base64(text)
        except ValueError as error:
            raise MediaError(f"image {name}: not valid base64: {error}", "media_url_invalid") from None
        return cls.read(data, name, config)

    def open(self) -> Image.Image:
        """Decode to upright RGB. Raise `MediaError`. Slow and memory-hungry: run it in a worker thread."""
        return _checked(decode, self.data, self.name, self.config)


def check_bytes(size: int, name: str, config: MediaConfig) -> None:
    """Raise `MediaError` if an encoded image has more bytes than allowed."""
    if size > config.max_bytes:
        raise MediaError(f"image {name}: more than {config.max_bytes:,} bytes", "media_too_large")


def _checked(read: Callable[..., T], data: bytes, name: str, config: MediaConfig) -> T:
    try:
        return read(io.BytesIO(data), name, config.max_pixels, config.formats)
    except OversizedImageError as error:
        raise MediaError(str(error), "media_too_large") from None
    except ImageError as error:
        raise MediaError(str(error), "media_format") from None
