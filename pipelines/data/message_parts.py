"""The content of one message: a text, or parts that may contain their images.

Parts of all common formats are read::

    {"type": "text", "text": …}                                  also "input_text", "output_text", "refusal"
    {"type": "image"}                                            the next image of the row's list (TRL)
    {"type": "image", "index": 0}                                image 0 of the row's list (TRL)
    {"type": "image", "image": …}                                an image in any notation (Qwen, TRL)
    {"type": "image", "path" | "url" | "base64" | "data": …}     transformers
    {"type": "image", "image_path" | "content": …}               others
    {"type": "image_url", "image_url": {"url": …} or …}          OpenAI; also "input_image"
    {"type": "image", "source": {"type": "base64", "data": …}}   Anthropic
    {"image": {"format": …, "source": {"bytes": …}}}             Bedrock
    {"inline_data": {"mime_type": …, "data": …}}                 Gemini
    {"image": …}, {"text": …}                                    the first Qwen-VL

A message may also have ``image`` or ``images`` of its own (ShareGPT, Ollama). Other media are
refused (`pipelines.data.media`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.data.media import MEDIA_PARTS, REMEDY, check_media, is_empty
from pipelines.data.rows import IMAGE_PLACEHOLDER, BadRow


@dataclass(frozen=True)
class FromList:
    """An image of the row's list: number ``index``, or the next one if that is None.

    ``others`` are the fields of its part that might name its image but are not understood.
    """

    index: int | None = None
    others: tuple[str, ...] = ()


Slot = object
"""The image of a placeholder: `FromList`, or the image itself in any notation."""


class Content(NamedTuple):
    """The text of a message, and the image of each of its placeholders."""

    text: str
    slots: list[Slot]


_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The field with the text, by type of part."""
_PLACES = ("bytes", "path", "url")
"""The fields of a mapping that is an image."""
_IMAGE_PARTS = {"image", "image_url", "input_image", "image_path", "image_file", "inline_data"}
_IMAGE_FIELDS = ("image", "image_url", "image_path", "image_file", "inline_data")
"""The fields of a part that are an image in any notation."""
_ENCODED = ("base64", "data", "image_base64", "image_data")
_HARMLESS = {
    *("type", "text", "detail", "index", "cache_control", "id", "name", "format", "media_type", "mime_type"),
    *("min_pixels", "max_pixels", "resized_height", "resized_width", "width", "height", "size"),
}
"""Fields of an image part that are not its image."""


def parse_content(turn: Mapping[str, Any], field: str, number: int) -> Content:
    """Return the content of message ``number``. Raise `BadRow` if it is malformed or has other media.

    Each part becomes a line, and an image part a placeholder.
    """
    name = f"`{field}` of message {number}"
    check_media(turn, f"message {number}")
    content = turn.get(field)
    if isinstance(content, str):
        return _with_own_images(turn, content)
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise BadRow("broken record", f"{name} is {type_name(content)}, expected text or a list of parts")
    lines: list[str] = []
    slots: list[Slot] = []
    for part in content:
        kind = _kind(part)
        if kind in MEDIA_PARTS:
            raise BadRow("other media", f"{name} has a part of type {kind!r}, {REMEDY}")
        if kind in _IMAGE_PARTS:
            lines.append(IMAGE_PLACEHOLDER)
            slots.append(_image_of(part, name))
        elif kind in _TEXT_PARTS and isinstance(text := part.get(_TEXT_PARTS[kind]), str):
            lines.append(text)
            slots += [FromList()] * text.count(IMAGE_PLACEHOLDER)
        else:
            shown = textwrap.shorten(repr(part), 80)
            raise BadRow("broken record", f"{name} has a part that is neither text nor image: {shown}")
    return Content("\n".join(lines), slots)


def fill_slots(slots: Sequence[Slot], listed: Sequence[object]) -> list[object]:
    """Return the image of each slot, and then the listed images that no slot takes.

    Raises:
        BadRow: a slot names an image that is not in the list.
    """
    own = [slot for slot in slots if not isinstance(slot, FromList)]
    if own and own == list(listed):  # the list repeats the images of the parts
        return own
    images: list[object] = []
    used: set[int] = set()
    following = 0
    for slot in slots:
        if not isinstance(slot, FromList):
            images.append(slot)
            continue
        index = following if slot.index is None else slot.index
        following = index + 1
        if 0 <= index < len(listed):
            images.append(listed[index])
            used.add(index)
        elif slot.others:
            has = ", ".join(f"`{name}`" for name in slot.others)
            raise BadRow(
                "broken record",
                "an image part has no image: expected `image`, `path`, `url`, `base64` or `source`; it has "
                + has,
            )
        elif slot.index is not None:
            raise BadRow(
                "placeholders", f"an image part has the index {index}, but the row lists {len(listed)} images"
            )
    return images + [image for index, image in enumerate(listed) if index not in used]


def is_absent(value: object) -> bool:
    """Return whether a field says "no image"; some writers do so by a mapping in which nothing is set."""
    if isinstance(value, Mapping) and any(name in value for name in _PLACES):
        return not any(value.get(name) for name in _PLACES)
    return value in (None, "", [])


def type_name(value: object) -> str:
    """Return the type of a value as reasons name it."""
    return "missing" if value is None else f"of type {type(value).__name__}"


def _with_own_images(turn: Mapping[str, Any], text: str) -> Content:
    """Assign a message's own images to its placeholders; without placeholders they come first."""
    given = next((turn[field] for field in ("image", "images") if not is_absent(turn.get(field))), None)
    if given is None:
        return Content(text, [FromList()] * text.count(IMAGE_PLACEHOLDER))
    own = given if isinstance(given, list) else [given]
    if IMAGE_PLACEHOLDER not in text:
        text = f"{IMAGE_PLACEHOLDER}\n" * len(own) + text
    missing = text.count(IMAGE_PLACEHOLDER) - len(own)
    return Content(text, [*own, *[FromList()] * missing])


def _kind(part: object) -> str | None:
    """Return the type of a part; without one, its only field."""
    if not isinstance(part, Mapping):
        return None
    if isinstance(kind := part.get("type"), str):
        return kind
    fields = [field for field, value in part.items() if not is_empty(value)]
    return (
        fields[0]
        if len(fields) == 1 and fields[0] in _TEXT_PARTS | dict.fromkeys(_IMAGE_PARTS | MEDIA_PARTS)
        else None
    )


def _image_of(part: Mapping[str, Any], name: str) -> Slot:
    """Return the image inside a part, or its place in the row's list."""
    given = [_unwrapped(part[field]) for field in _IMAGE_FIELDS if not is_absent(part.get(field))]
    given += [part["content"]] if isinstance(part.get("content"), str) and part["content"] else []
    place = {field: part[field] for field in _PLACES if not is_empty(part.get(field))}
    given += [place] if place else []
    given += [{"bytes": part[field]} for field in _ENCODED if not is_empty(part.get(field))]
    if isinstance(part.get("source"), Mapping) and not is_empty(part["source"]):
        given.append(_unwrapped(part["source"]))
    found = [image for image in given if image is not None]
    if len(found) > 1:
        raise BadRow("broken record", f"{name} has an image part with several images: keep one field")
    if found:
        return found[0]
    index = part.get("index")
    others = (field for field, value in part.items() if field not in _HARMLESS and not is_empty(value))
    return FromList(index if isinstance(index, int) and not isinstance(index, bool) else None, tuple(others))


def _unwrapped(image: object) -> object:
    """Return an image whose bytes may be named as in Anthropic's, Bedrock's and Gemini's formats.

    A mapping that only names a file in somebody's storage is no image: None.
    """
    if not isinstance(image, Mapping):
        return image
    if isinstance(source := image.get("source"), Mapping):
        image = source
    encoded = next((image[field] for field in _ENCODED if not is_empty(image.get(field))), None)
    if encoded is not None:
        return {"bytes": encoded}
    return None if not is_empty(image.get("file_id")) and is_absent({"url": None, **image}) else dict(image)
