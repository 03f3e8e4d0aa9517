"""Parse one record into one row, or raise `BadRow` with the reason.

These formats are read and may be mixed::

    {"id", "image": path or list, "conversations": [{"from": "human" | "gpt" | "system", "value": text}]}
    {"id", "images": list, "messages": [{"role": "user" | "assistant" | "system", "content": text or parts}]}

`pipelines.data.turns` lists further fields. `pipelines.data.message_parts` describes the parts, which may
contain their images. An image is a path, a URL, a data URL, base64, or a mapping with one of ``bytes``
(base64 in JSON), ``path`` and ``url``.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.data.encoded import is_data_url, is_image_base64
from pipelines.data.images import FileImage, ImageError, InlineImage, ParquetImage, TarImage, TsvImage
from pipelines.data.media import check_media, check_other_images, check_placeholders_of_media
from pipelines.data.message_parts import (
    Slot,
    fill_slots,
    is_absent,
    parse_content,
    type_name,
)
from pipelines.data.rows import IMAGE_PLACEHOLDER, BadRow, ImageSource, Message, Role, TrainingRow
from pipelines.data.storage import absolute
from pipelines.data.turns import turns_of

_ROLES: dict[object, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
_TOOLS = {
    *("tool", "tool_call", "tool_response", "tool_result", "function", "function_call", "function_response"),
    *("observation", "ipython", "environment"),
}
"""Speakers of tool calls and their results, in the formats of OpenAI, ShareGPT, Llama and Qwen."""
_FIELDS = (("from", "value"), ("role", "content"))
_LONGEST_PATH = 4096
"""Bytes of a path in Linux."""

_LONGEST_NAME = 255
"""Bytes of the name of a file or folder."""


def parse_row(
    value: object,
    *,
    key: str,
    image_root: str,
    max_pixels: int,
    source: str = "",
    without_answer: bool = False,
) -> TrainingRow:
    """Return the row of a record. Images are referred to, not opened.

    A question at the end of the conversation is left out with its images: no answer to it could be learnt or
    compared. If it is the only question, the row is refused, unless ``without_answer`` is true.

    Raises:
        BadRow: the record has a wrong type, conversation or number of images, or other media than images.
    """
    if not isinstance(value, dict):
        raise BadRow("broken record", f"the row is {type_name(value)}, expected an object")
    messages, slots = _parse_turns(value)
    images = tuple(
        parse_image(image, f"#{number} of row {key}", image_root, max_pixels)
        for number, image in enumerate(fill_slots(slots, _listed(value)), start=1)
    )
    turns = _check_speakers(messages)
    if turns == 1 and not without_answer:
        raise BadRow(
            "conversation",
            "the conversation has no assistant answer to train on; in data.train, the full-token model can "
            "answer it: set training.objective to distill or both",
        )
    if not images:
        check_other_images(value)
    check_placeholders(messages, len(images))
    if messages[-1].role == "user" and turns > 1:
        images = images[: len(images) - messages[-1].text.count(IMAGE_PLACEHOLDER)]
        messages = messages[:-1]
    task = value.get("task") or ""
    if not isinstance(task, str):
        raise BadRow("broken record", f"`task` is {type_name(task)}, expected text")
    return TrainingRow(key, images, messages, task, source)


# ----------------------------------------------------------------------------------------- messages


def parse_messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the messages of the row's conversation. Raise `BadRow` if they are malformed."""
    return _parse_turns(row)[0]


def _parse_turns(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], list[Slot]]:
    """Return the messages, and the image of each of their placeholders."""
    check_media(row, "the row")
    field, turns, speaker, text = turns_of(row)
    if not isinstance(turns, list):
        raise BadRow("broken record", f"`{field}` is {type_name(turns)}, expected a list")
    messages: list[Message] = []
    slots: list[Slot] = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise BadRow("broken record", f"message {number} is {type_name(turn)}, expected an object")
        names = (speaker, text)
        if turn.get(speaker) is None:  # ShareGPT's field names under `messages`, or OpenAI's in the other
            names = next((pair for pair in _FIELDS if turn.get(pair[0]) is not None), names)
        role = _role(turn, names[0], number)
        content = parse_content(turn, names[1], number)
        if role == "user":
            check_placeholders_of_media(content.text, f"`{names[1]}` of message {number}")
        messages.append(Message(role, content.text))
        slots += content.slots
    return tuple(messages), slots


def _role(turn: Mapping[str, Any], field: str, number: int) -> Role:
    """Return who speaks. Raise `BadRow` for a turn that cannot be learnt."""
    name = turn.get(field)
    calls = next((call for call in ("tool_calls", "function_call") if turn.get(call)), None)
    if calls is not None or (isinstance(name, str) and name in _TOOLS):
        given = f"`{field}` {name!r}" if calls is None else f"`{calls}`"
        raise BadRow(
            "conversation",
            f"message {number} belongs to a tool call ({given}), which cannot be trained or answered: remove "
            "the tool turns or the row",
        )
    if not isinstance(name, str) or name not in _ROLES:
        known = ", ".join(str(role) for role in _ROLES)
        raise BadRow("conversation", f"message {number} has the unknown `{field}` {name!r}; known: {known}")
    if _ROLES[name] == "assistant" and turn.get("weight") is not None and not turn["weight"]:
        raise BadRow(
            "conversation",
            f"message {number} has `weight` 0, but every answer of a row is learnt: remove the field or the "
            "row",
        )
    return _ROLES[name]


def _check_speakers(messages: tuple[Message, ...]) -> int:
    """Return the number of turns. Raise `BadRow` if one is empty, or if they are missing or out of order."""
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
    return len(turns)


# ------------------------------------------------------------------------------------------- images


def listed_images(row: Mapping[str, Any]) -> list[object]:
    """Return the images of a row: those in ``image`` or ``images``, and those inside its messages.

    They are in the order of their placeholders. If the row has a valid conversation, images inside it take
    the places of their parts, and listed images fill the other placeholders.

    Raises:
        BadRow: both ``image`` and ``images`` are given, or there is another medium but no image.
    """
    listed = _listed(row)
    try:
        return fill_slots(_parse_turns(row)[1], listed)
    except BadRow as problem:
        # A job with a prompt of its own needs no conversation.
        if problem.kind == "placeholders" or (problem.kind == "other media" and not listed):
            raise
        return listed


def _listed(row: Mapping[str, Any]) -> list[object]:
    values = [row[field] for field in ("image", "images") if not is_absent(row.get(field))]
    if len(values) > 1:
        raise BadRow("broken record", "the row has both `image` and `images`; keep one of them")
    if not values:
        return []
    return values[0] if isinstance(values[0], list) else [values[0]]


def parse_image(value: object, name: str, image_root: str, max_pixels: int) -> ImageSource:
    """Return a reference to an image in any notation, unopened. Raise `BadRow` if it is malformed."""
    if isinstance(value, ParquetImage | TarImage | TsvImage | FileImage | InlineImage):
        return value
    encoded = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if isinstance(encoded, bytes):  # nested in the messages of a parquet file
        return InlineImage(encoded, name, max_pixels)
    if isinstance(value, dict):
        value = encoded or value.get("path") or value.get("url")
    if not isinstance(value, str) or not value:
        raise BadRow("broken record", f"image {name} is {type_name(value)}, expected a path, a URL or base64")
    if not encoded and not is_data_url(value) and not _is_bare_base64(value, image_root):
        if _is_no_path(value, image_root):
            what = f"a text of {len(value):,} characters: neither a path nor base64 of an image"
            raise BadRow("broken record", f"image {name} is {what}")
        return FileImage(absolute(value) if "://" in value else posixpath.join(image_root, value), max_pixels)
    try:
        return InlineImage.from_base64(value, name, max_pixels)
    except ImageError as error:
        raise BadRow(error.kind, str(error)) from None


def _is_no_path(text: str, image_root: str) -> bool:
    """Return whether a text is too long for a path, or one of its parts for the name of a local file."""
    if "://" in text:
        return False
    if len(text) > _LONGEST_PATH:
        return True
    return "://" not in image_root and any(len(name) > _LONGEST_NAME for name in text.split("/"))


def _is_bare_base64(text: str, image_root: str) -> bool:
    """Return whether a text is base64 of an image, and not the path of a file that exists.

    Base64 of a JPEG begins with ``/9j/``, as a path might.
    """
    if not is_image_base64(text):
        return False
    local = len(text) <= _LONGEST_PATH and "://" not in image_root
    try:
        return not (local and Path(image_root, text).exists())
    except OSError:  # a part of it is too long for a name
        return True


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
