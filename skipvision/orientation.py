"""Turn images upright by their EXIF orientation, even if the EXIF block is damaged.

Pillow's `exif_transpose` reads, and rewrites, the whole block and raises errors of many types if any part of
it is wrong. Viewers need only the orientation, and show the image as stored if they cannot read it.
"""

from __future__ import annotations

import re
import struct

from PIL import Image

_TAG = 0x0112
_SHORT, _LONG = 3, 4
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image: Image.Image) -> Image.Image:
    """Return the image turned by its orientation, or unchanged if it has none that can be read."""
    method = _METHODS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _orientation(image: Image.Image) -> int:
    for block in _blocks(image):
        if found := _orientation_in(block):
            return found
    try:
        found = image.getexif().get(_TAG)  # also in the tags of TIFF, and in XMP
    except Exception:  # damaged blocks raise errors of many types
        return 1
    return found if isinstance(found, int) else 1


def _blocks(image: Image.Image) -> list[bytes]:
    """Return the EXIF blocks of an image; in a PNG they may be hexadecimal text."""
    blocks = [image.info[name] for name in ("exif",) if isinstance(image.info.get(name), bytes)]
    for name in ("Raw profile type exif", "Raw profile type APP1"):
        text = image.info.get(name)
        if isinstance(text, str):
            digits = "".join(text.split("\n")[3:])  # an empty line, the name and the length come before
            blocks.append(bytes.fromhex((re.match(r"(?:[0-9A-Fa-f]{2})*", digits) or [""])[0]))
    return blocks


def _orientation_in(block: bytes) -> int | None:
    """Return the orientation in the first directory of a TIFF header; None if it cannot be found."""
    while block.startswith(b"Exif\x00\x00"):
        block = block[6:]
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(block[:4])
    if order is None or len(block) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}L", block, 4)
    if start + 2 > len(block):
        return None
    (entries,) = struct.unpack_from(f"{order}H", block, start)
    for number in range(entries):
        entry = block[start + 2 + 12 * number :][:12]
        if len(entry) < 10:
            return None
        tag, kind, _ = struct.unpack_from(f"{order}HHL", entry)
        if tag == _TAG and kind in (_SHORT, _LONG):
            value: int = struct.unpack_from(f"{order}{'H' if kind == _SHORT else 'L'}", entry.ljust(12), 8)[0]
            return value if value in range(1, 9) else None
    return None
