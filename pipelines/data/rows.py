"""Row contracts: what every reader yields and every pipeline consumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a message's text where one of the row's images belongs."""

Role = Literal["system", "user", "assistant"]

RejectKind = Literal[
    "broken record",  # not JSON, or values of the wrong type
    "conversation",  # empty, without an answer, or with speakers out of order
    "placeholders",  # not as many <image> as images
    "too long",  # more tokens than may be trained on
    "missing image",
    "unreadable image",  # no image, corrupt, or truncated
    "oversized image",
]


class ImageSource(Protocol):
    """Where an image's bytes come from; opened only when the row is used. Hashable, and pickles small."""

    def open(self) -> Image.Image:
        """The decoded RGB image, upright; raises `DataError` if it is missing, corrupt or too large."""

    def read(self) -> bytes:
        """The encoded image; raises `DataError` if it is missing or cannot be read."""

    def __str__(self) -> str:
        """How a message or a rejects file names the image."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; a user's ``text`` holds one ``<image>`` for each image shown in it."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One conversation with its images in the order of their placeholders.

    ``key`` is unique within a data set. After an optional system message, user and assistant take
    turns, the user first; at least one assistant message is there. ``task`` names the slice the row is
    evaluated under; empty where the data set has no such column.
    """

    key: str
    images: tuple[ImageSource, ...]
    messages: tuple[Message, ...]
    task: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was left out: where it stands, its key if it has one, and why.

    ``kind`` is what rejects are counted by, ``reason`` the sentence for the data set's owner.
    """

    source: str
    key: str
    kind: RejectKind
    reason: str


def pick_rows(rows: Sequence[TrainingRow], max_rows: int) -> list[TrainingRow]:
    """Return up to ``max_rows`` rows in their order: the first of each task, with equal shares of tasks."""
    seen: dict[str, int] = {}
    ranked = []
    for position, row in enumerate(rows):
        seen[row.task] = seen.get(row.task, 0) + 1
        ranked.append((seen[row.task], position))
    return [rows[position] for position in sorted(position for _, position in sorted(ranked)[:max_rows])]
