"""The row types that readers yield and jobs consume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
"""Marks the position of an image in a message's text."""

Role = Literal["system", "user", "assistant"]

RejectKind = Literal[
    "broken record",  # not JSON, or values of the wrong type
    "conversation",  # empty, without an answer, or with speakers out of order
    "other media",  # a video, audio, document or point cloud: the model reads text and images
    "placeholders",  # the numbers of <image> and of images differ
    "too long",  # more tokens than data.max_length, or than the model has positions
    "missing image",
    "refused image",  # the storage or the server denies access
    "unreachable image",  # the storage or the server failed, repeatedly
    "unreadable image",  # no image, corrupt, or truncated
    "oversized image",
]


DataSet = Literal["train", "validation"]
"""A data set of a run, by the name of its setting."""
DATA_SETS: tuple[DataSet, DataSet] = ("train", "validation")


class BadRow(Exception):
    """A record that cannot become a row.

    Attributes:
        kind: the kind that it is counted under.
        reason: the explanation for the owner of the data set.
    """

    def __init__(self, kind: RejectKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: RejectKind = kind
        self.reason = reason


class ImageSource(Protocol):
    """A reference to an image, opened when its row is used. Hashable; small when pickled."""

    def open(self) -> Image.Image:
        """Return the image, RGB and upright. Raise `DataError` if it is missing, corrupt or too large."""

    def read(self) -> bytes:
        """Return the encoded image. Raise `DataError` if it is missing or unreadable."""

    def __str__(self) -> str:
        """Return the image's name in messages and in the rejects file."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. A user's ``text`` has one ``<image>`` for each of its images."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One conversation with its images.

    Attributes:
        key: unique within the data set.
        images: in the order of their placeholders.
        messages: an optional system message, then user and assistant in turns, the user first and an
            assistant last. The only turn of a row without answer is the user's.
        task: the slice that the row is evaluated under; "" if the data set has no such column.
        source: file and position, ``"train.json: row 17"``; "" if the row is not from a file.
    """

    key: str
    images: tuple[ImageSource, ...]
    messages: tuple[Message, ...]
    task: str = ""
    source: str = field(default="", compare=False)

    @property
    def answered(self) -> bool:
        """Whether the row has an answer to learn."""
        return self.messages[-1].role == "assistant"


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that was left out.

    Attributes:
        source: file and position, ``"train.json: row 17"``.
        key: the row's key; "" if it has none.
        kind: the kind that it is counted under.
        reason: the explanation for the owner of the data set.
        data_sets: the data sets that have the row.
    """

    source: str
    key: str
    kind: RejectKind
    reason: str
    data_sets: tuple[DataSet, ...] = ()


def pick_rows(rows: Sequence[TrainingRow], max_rows: int) -> list[TrainingRow]:
    """Return up to ``max_rows`` rows in their order: the first of each task, with equal shares of tasks."""
    seen: dict[str, int] = {}
    ranked = []
    for position, row in enumerate(rows):
        seen[row.task] = seen.get(row.task, 0) + 1
        ranked.append((seen[row.task], position))
    return [rows[position] for position in sorted(position for _, position in sorted(ranked)[:max_rows])]
