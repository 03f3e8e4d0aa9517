"""Decode base64 and data URLs; one place for data sets and the endpoint."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

_WHITE = " \t\r\n\f\v"
_SPACES = str.maketrans("", "", _WHITE)


def without_white_space(text: str) -> str:
    """Return base64 text without the line breaks and spaces that MIME and ``base64 -w76`` put into it."""
    return text.translate(_SPACES)


def decode_base64(text: str) -> bytes:
    """Return the bytes of base64 text, which may have line breaks. Raise `ValueError` if it is not base64."""
    return base64.b64decode(without_white_space(text), validate=True)


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
