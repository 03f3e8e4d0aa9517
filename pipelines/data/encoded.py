"""Decode base64 and data URLs; shared by data sets and the endpoint."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

_WHITE = " \t\r\n\f\v"
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}={0,2}\s*")
_HEADS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp|P[1-6]\s", re.DOTALL
)
"""The first bytes of images. BMP has four zeros that no text of a path would encode."""
_SPACES = str.maketrans("", "", _WHITE)
_URL_SAFE = str.maketrans("-_", "+/")


def without_white_space(text: str) -> str:
    """Return base64 text without the line breaks and spaces that MIME and ``base64 -w76`` put into it."""
    return text.translate(_SPACES)


def decode_base64(text: str) -> bytes:
    """Return the bytes of base64 text. Raise `ValueError` if it is not base64.

    It may have line breaks, the URL-safe letters ``-`` and ``_`` (RFC 4648, section 5), and no padding.
    """
    letters = without_white_space(text).translate(_URL_SAFE)
    return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)


def split_data_url(url: str) -> tuple[str, list[str], str]:
    """Return the media type, the parameters and the content of a data URL.

    Type and parameters are in lower case. Percent escapes in base64, such as ``%0A``, are decoded. A URL
    without a comma has no parameters.
    """
    head, comma, content = url.strip(_WHITE).partition(",")
    if not comma:
        return "", [], ""
    kind, *parameters = without_white_space(head)[len("data:") :].lower().split(";")
    if "%" in content and parameters[-1:] == ["base64"]:
        content = unquote(content)
    return kind, parameters, content


def is_data_url(text: str) -> bool:
    """Return whether a text is a data URL, in any case and after white space."""
    return bool(re.match(r"\s*data:", text, re.IGNORECASE))


def is_image_base64(text: str) -> bool:
    """Return whether a text without any prefix is base64 that begins as an image file does."""
    if not _BASE64.fullmatch(text):
        return False
    head = without_white_space(text[:200])[:32]  # 24 bytes
    return len(head) == 32 and _HEADS.match(decode_base64(head)) is not None
