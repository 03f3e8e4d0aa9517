"""Row contracts: what every reader yields and every pipeline consumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a message's text where one of the row's images belongs."""


class ImageSource(Protocol):
    """Where an image's bytes come from; opened only when the row is used."""

    def open(self) -> Image.Image:
        """The decoded RGB image; raises `DataError` if it is missing, corrupt or too large."""

    def __str__(self) -> str:
        """How a message or a rejects file names the image."""


@dataclass(frozen=True)
class Message:
    """One turn; ``text`` holds one ``<image>`` for each image shown in it."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True)
class TrainingRow:
    """One conversation with its images in the order of their placeholders.

    ``task`` names the slice the row is evaluated under; empty where the data set has no such column.
    """

    key: str
    images: tuple[ImageSource, ...]
    messages: tuple[Message, ...]
    task: str = ""


@dataclass(frozen=True)
class Reject:
    """A row that was left out: where it stands, its key if it has one, and why."""

    source: str
    key: str
    reason: str
