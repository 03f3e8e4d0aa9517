"""Media that the model cannot read: videos, audio, documents, point clouds. Rows with them are rejected.

Such a row would otherwise be trained as if its medium were not there. Names of fields such as ``video`` say
by themselves that the value is a medium. Others, such as ``speech`` or ``document``, are also names of texts
and numbers: there the value must be the name of such a file, its bytes, or a mapping with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pipelines.data.rows import IMAGE_PLACEHOLDER, BadRow


def _endings(*media: str) -> frozenset[str]:
    endings = ("", "s", "_path", "_paths", "_url", "_urls", "_file", "_files", "_bytes")
    return frozenset(medium + ending for medium in media for ending in endings)


_ALWAYS = _endings("video", "audio", "wav", "pdf", "pcd", "point_cloud", "pointcloud", "input_audio")
_IF_FILES = _endings(
    *("sound", "speech", "voice", "recording", "song", "music", "waveform", "spectrogram"),
    *("clip", "frame", "video_frame", "depth", "depth_map", "mesh", "point", "3d"),
    *("document", "doc", "file", "media", "medium", "attachment"),
)
MEDIA_FIELDS = _ALWAYS | _IF_FILES
"""Fields of rows and messages, in lower case."""
_IMAGES_TOO = _endings("clip", "frame", "video_frame", "depth", "depth_map")
"""Fields whose files may have the suffix of an image."""

OTHER_IMAGE_FIELDS = _endings("image", "img", "picture", "photo", "pixel_value") - {"image", "images"}
"""Fields, in lower case, that other projects have images in."""

MEDIA_PARTS = frozenset(
    name
    for medium in (
        *("video", "audio", "sound", "speech", "voice", "file", "document", "pdf", "media"),
        *("point_cloud", "pointcloud", "depth", "mesh"),
    )
    for name in (medium, f"{medium}_url", f"{medium}_file", f"input_{medium}")
)
"""Types of message parts with other media."""

_FILES = (
    "mp4 mov avi mkv webm m4v mpg mpeg wmv flv ts gifv wav mp3 flac ogg oga opus m4a aac wma aiff amr "
    "pdf doc docx ppt pptx xls xlsx epub djvu ply pcd las laz e57 obj stl glb gltf off npy npz pt"
)
_SUFFIXES = frozenset(f".{extension}" for extension in _FILES.split())
_IMAGES = "jpg jpeg png webp gif bmp tif tiff exr"
_IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in _IMAGES.split())
_LONGEST_NAME = 4096

_MARK = (
    r"(?:<(?:video|audio|sound|speech|voice|point_?cloud|point|pcd|mesh|depth)(?:_?\d+)?>"
    r"|<\|(?:video|audio)(?:_pad)?\|>)"
)
_EDGE = r"(?:<\|(?:vision|audio)_(?:start|bos|end|eos)\|>)"
_ALONE = re.compile(
    rf"^(?:{_EDGE}|{re.escape(IMAGE_PLACEHOLDER)}|\s)*({_MARK})(?:{_EDGE}|{_MARK}|<image>|\s)*$", re.I | re.M
)
_GLUED = re.compile(rf"^\s*(?:{_EDGE})*({_MARK})(?:{_EDGE}|{_MARK})*(?=\w)", re.I)

REMEDY = "which the model cannot read: it reads text and images. Remove the row, or show images instead"

UNREAD = b"?"
"""The value of a field of media whose content was not read from its file."""


def check_media(fields: Mapping[str, Any], name: str) -> None:
    """Raise `BadRow` if a row or a message has a medium in a field of its own."""
    for field, value in fields.items():
        if _is_medium(str(field).lower(), value):
            raise BadRow("other media", f"{name} has `{field}`, {REMEDY}")


def check_other_images(row: Mapping[str, Any]) -> None:
    """Raise `BadRow` if a row without images has one in a field that is not read."""
    for field, value in row.items():
        known = str(field).lower() in OTHER_IMAGE_FIELDS
        if known and not is_empty(value) and not isinstance(value, bool | int | float):
            raise BadRow(
                "missing image",
                f"the row has no `image` or `images`, but `{field}`, which is not read: rename the field",
            )


def check_placeholders_of_media(text: str, name: str) -> None:
    """Raise `BadRow` if a text has a placeholder of a medium, as data sets write it.

    It is alone on its line, or glued to the beginning of the text: ``<video>What happens?``. In other places,
    as in "the <video> tag of HTML", it is text.
    """
    found = _ALONE.search(text) or _GLUED.search(text)
    if found and f"</{found[1][1:]}" not in text:
        raise BadRow("other media", f"{name} has {found[1]}, {REMEDY}")


def needs_no_content(field: str, *, is_number: bool, has_bytes: bool) -> bool:
    """Return whether it is known without the content of a column's cells that they are media or images.

    Args:
        field: name of the column.
        is_number: the column has numbers or booleans.
        has_bytes: the column has bytes, also inside of lists and structs.
    """
    name = field.lower()
    return not is_number and name in OTHER_IMAGE_FIELDS | (MEDIA_FIELDS if has_bytes else _ALWAYS)


def is_empty(value: object) -> bool:
    """Return whether a field is null, empty, or made of nothing else."""
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    return value is None or value in ("", b"")


def _is_medium(field: str, value: object) -> bool:
    if field in _ALWAYS:
        return not is_empty(value) and not isinstance(value, bool | int | float)
    if field in _IF_FILES:
        return _is_file(value, _SUFFIXES | _IMAGE_SUFFIXES if field in _IMAGES_TOO else _SUFFIXES)
    return False


def _is_file(value: object, suffixes: frozenset[str]) -> bool:
    """Return whether a value is the content of a file, or the name of one with such a suffix."""
    if isinstance(value, list):
        return any(_is_file(one, suffixes) for one in value)
    if isinstance(value, Mapping):
        if any(not is_empty(value.get(name)) for name in ("array", "bytes", "data", "base64", "file_id")):
            return True
        return any(_is_file(value.get(name), suffixes) for name in ("path", "url", "uri", "src", "file"))
    if isinstance(value, bytes):
        return bool(value)
    if not isinstance(value, str) or len(value) > _LONGEST_NAME or "\n" in value:
        return False
    if value.startswith("data:"):
        return not value.startswith("data:text/")
    try:
        name = urlsplit(value).path if "://" in value else value
    except ValueError:
        return False
    return PurePosixPath(name).suffix.lower() in suffixes
