"""Image files with damaged parts: leave out broken metadata, and name what is broken in the pixels.

Viewers show a PNG or JPEG whose metadata are broken; Pillow refuses many of them. `without_metadata` returns
the same file with nothing but what its pixels and its orientation need. Pillow then checks that file in the
same way, and nothing in it is decompressed here.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_MAGIC = {
    "PNG": (0, (_PNG,)),
    "JPEG": (0, (_JPEG,)),
    "GIF": (0, (b"GIF87a", b"GIF89a")),
    "BMP": (0, (b"BM",)),
    "TIFF": (0, (b"II*\0", b"MM\0*")),
    "WEBP": (8, (b"WEBP",)),
    "AVIF": (4, (b"ftypavif", b"ftypavis")),
}
_GREY, _RGB, _PALETTE = 0, 2, 3
_TRANSPARENCY_BYTES = {_PALETTE: 1, _GREY: 2, _RGB: 6}
"""The least bytes of a tRNS chunk, by the PNG's colour type."""

_SEGMENTS = range(0xC0, 0xFF)
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_APPLICATION = range(0xE0, 0xF0)
_COMMENT = 0xFE


class _Chunk(NamedTuple):
    """A chunk of a PNG: whether all its bytes are there, and whether its checksum is right."""

    name: bytes
    data: bytes
    is_whole: bool
    is_sound: bool


def kind_of(data: bytes) -> str | None:
    """Return the format that a file begins as: ``"PNG"``, ``"JPEG"`` …; None if it is unknown."""
    for name, (start, magics) in _MAGIC.items():
        if data[start:].startswith(magics):
            return name
    return None


def without_metadata(data: bytes) -> bytes | None:
    """Return a PNG or JPEG with only its pixels, sound transparency and orientation; None for other files."""
    if data.startswith(_PNG):
        return _PNG + b"".join(_encoded(chunk) for chunk in _needed(_chunks(data)))
    if data.startswith(_JPEG):
        return _jpeg_without_metadata(data)
    return None


def damage_of(data: bytes) -> str | None:
    """Return what is damaged in a PNG or JPEG, as "is a PNG whose IDAT chunk is damaged"; None if unknown."""
    if data.startswith(_JPEG) and _END_OF_IMAGE not in data:
        return "is a JPEG that is cut off"
    if not data.startswith(_PNG):
        return None
    chunk = None
    for chunk in _chunks(data):
        name = chunk.name.decode("ascii", "replace")
        if not chunk.name.isalpha():
            return "is a PNG that is damaged: it has no chunk where one must begin"
        if not chunk.is_whole:
            return f"is a PNG that is cut off in its {name} chunk"
        if chunk.name[:1].isupper() and not chunk.is_sound:
            return f"is a PNG whose {name} chunk is damaged"
    if chunk is None or chunk.name != b"IEND":
        return "is a PNG that is cut off"
    return None


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Yield the chunks of a PNG up to its end, or up to one that is cut off or has no name."""
    at = len(_PNG)
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        is_sound = checksum == struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))
        yield _Chunk(name, content, len(checksum) == 4, is_sound)
        at += 12 + length
        if name == b"IEND" or not name.isalpha() or len(checksum) < 4:
            return


def _needed(chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
    """Yield all critical chunks, and of the others the orientation and transparency that can be used."""
    least: float = math.inf
    for chunk in chunks:
        if chunk.name == b"IHDR" and len(chunk.data) > 9:
            least = _TRANSPARENCY_BYTES.get(chunk.data[9], 1)
        orientation = chunk.name == b"eXIf" and chunk.is_whole
        transparency = chunk.name == b"tRNS" and chunk.is_sound and len(chunk.data) >= least
        if chunk.name[:1].isupper() or orientation or transparency:
            yield chunk


def _encoded(chunk: _Chunk) -> bytes:
    checksum = zlib.crc32(chunk.data, zlib.crc32(chunk.name))
    if chunk.name[:1].isupper() and not chunk.is_sound:
        checksum ^= 0xFFFFFFFF  # damaged pixels stay damaged
    return struct.pack(">I", len(chunk.data)) + chunk.name + chunk.data + struct.pack(">I", checksum)


def _jpeg_without_metadata(data: bytes) -> bytes:
    kept = [data[:2]]
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF or data[at + 1] not in _SEGMENTS:
            break  # fill bytes, or no JPEG: the decoder decides
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == _START_OF_SCAN:
            break
        content = data[at + 4 : end]
        is_metadata = marker in _APPLICATION or marker == _COMMENT
        is_needed = content.startswith(b"Exif\0\0") or (content.startswith(b"Adobe") and len(content) >= 12)
        if not is_metadata or is_needed:
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])
