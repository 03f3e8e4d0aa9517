"""Parse one record into one row, or raise `BadRow` with the reason.

Two formats are read and may be mixed::

    {"id", "image": path or list, "conversations": [{"from": "human" | "gpt" | "system", "value": text}]}
    {"id", "images": list, "messages": [{"role": "user" | "assistant" | "system", "content": text or parts}]}

A part is ``{"type": "text", "text": …}`` or ``{"type": "image"}``. An image is a path, a URL, a data
URL, or a mapping with one of ``bytes`` (base64 in JSON), ``path`` and ``url``.
"""

from __future__ import annotations

import posixpath
import textwrap
from collections.abc import Mapping
from typing import Any

from pipelines.data.encoded import is_data_url
from pipelines.data.images import FileImage, ImageError, InlineImage, ParquetImage, TarImage, TsvImage
from pipelines.data.rows import IMAGE_PLACEHOLDER, ImageSource, Message, RejectKind, Role, TrainingRow
from pipelines.data.storage import absolute

_ROLES: dict[object, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


_NAMES = ("bytes", "path", "url")


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


def parse_row(value: object, *, key: str, image_root: str, max_pixels: int) -> TrainingRow:
    """Return the row of a record. Images are referred to, not opened.

    Raises:
        BadRow: the record has a wrong type, conversation or number of images.
    """
    if not isinstance(value, dict):
        raise BadRow("broken record", f"the row is {_type(value)}, expected an object")
    messages = parse_messages(value)
    images = tuple(
        parse_image(image, f"#{number} of row {key}", image_root, max_pixels)
        for number, image in enumerate(listed_images(value), start=1)
    )
    _check_speakers(messages)
    check_placeholders(messages, len(images))
    task = value.get("task") or ""
    if not isinstance(task, str):
        raise BadRow("broken record", f"`task` is {_type(task)}, expected text")
    return TrainingRow(key, images, messages, task)


# ----------------------------------------------------------------------------------------- messages


def parse_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the messages in ``conversations`` or ``messages``. Raise `BadRow` if they are malformed."""
    field, speaker, text = "conversations", "from", "value"
    if row.get(field) is None:
        field, speaker, text = "messages", "role", "content"
    turns = row.get(field)
    if turns is None:
        raise BadRow("conversation", "the row has neither `conversations` nor `messages`")
    if not isinstance(turns, list):
        raise BadRow("broken record", f"`{field}` is {_type(turns)}, expected a list")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow("broken record", f"message {number} is {_type(turn)}, expected an object")
        name = turn.get(speaker)
        if not isinstance(name, str) or name not in _ROLES:
            known = ", ".join(str(role) for role in _ROLES)
            raise BadRow(
                "conversation", f"message {number} has the unknown `{speaker}` {name!r}; known: {known}"
            )
        messages.append(Message(_ROLES[name], _parse_text(turn.get(text), f"`{text}` of message {number}")))
    return tuple(messages)


def _parse_text(content: object, name: str) -> str:
    """Return the text of a message: one line for each part, and a placeholder for an image part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow("broken record", f"{name} is {_type(content)}, expected text or a list of parts")
    lines = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            lines.append(IMAGE_PLACEHOLDER)
        elif kind == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
        else:
            raise BadRow(
                "broken record",
                f"{name} has a part that is neither text nor image: {textwrap.shorten(repr(part), 80)}",
            )
    return "\n".join(lines)


def _check_speakers(messages: tuple[Message, ...]) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise BadRow("conversation", "the conversation is empty")
    for number, message in enumerate(messages, start=1):
        if not message.text.strip():
            raise BadRow("conversation", f"message {number} ({message.role}) has no text")
    offset = len(messages) - len(turns) + 1
    for position, message in enumerate(turns):
        expected = "assistant" if position % 2 else "user"
        if message.role != expected:
            raise BadRow(
                "conversation",
                f"message {position + offset} is by {message.role}, expected {expected}: "
                "user and assistant alternate, starting with the user",
            )
    if len(turns) == 1:
        raise BadRow("conversation", "the conversation has no assistant answer to train on")


# ------------------------------------------------------------------------------------------- images


def listed_images(row: Mapping[str, Any]) -> list[object]:
    """Return the images in ``image`` or ``images``. Raise `BadRow` if both are given; empty is absent."""
    values = [row[field] for field in ("image", "images") if not _is_absent(row.get(field))]
    if len(values) > 1:
        raise BadRow("broken record", "the row has both `image` and `images`; keep one of them")
    if not values:
        return []
    return values[0] if isinstance(values[0], list) else [values[0]]


def _is_absent(value: object) -> bool:
    """Return whether a cell says "no image"; some writers do so by a mapping in which nothing is set."""
    if isinstance(value, dict) and any(name in value for name in _NAMES):
        return not any(value.get(name) for name in _NAMES)
    return value in (None, "", [])


def parse_image(value: object, name: str, image_root: str, max_pixels: int) -> ImageSource:
    """Return a reference to an image in any notation, unopened. Raise `BadRow` if it is malformed."""
    if isinstance(value, ParquetImage | TarImage | TsvImage | FileImage | InlineImage):
        return value
    encoded = value.get("bytes") if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = encoded or value.get("path") or value.get("url")
    if not isinstance(value, str) or not value:
        raise BadRow("broken record", f"image {name} is {_type(value)}, expected a path, a URL or base64")
    if not encoded and not is_data_url(value):
        return FileImage(absolute(value) if "://" in value else posixpath.join(image_root, value), max_pixels)
    try:
        return InlineImage.from_base64(value, name, max_pixels)
    except ImageError as error:
        raise BadRow(error.kind, str(error)) from None


def check_placeholders(messages: tuple[Message, ...], images: int) -> None:
    """Raise `BadRow` unless the user's messages have one placeholder for each image."""
    for number, message in enumerate(messages, start=1):
        if message.role != "user" and IMAGE_PLACEHOLDER in message.text:
            raise BadRow(
                "placeholders",
                f"{IMAGE_PLACEHOLDER} is in message {number} ({message.role}); only a user's may have it",
            )
    found = sum(message.text.count(IMAGE_PLACEHOLDER) for message in messages)
    if found == images:
        return
    reason = f"{_count(found, f'{IMAGE_PLACEHOLDER} placeholder')} for {_count(images, 'image')}"
    if not found:
        missing = (IMAGE_PLACEHOLDER + "\\n") * images
        reason += f'; put "{missing}" at the start of the first user message'
    raise BadRow("placeholders", reason)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _type(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
