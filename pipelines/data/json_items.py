"""Read the elements of a JSON list one at a time: a file of millions of rows needs little memory.

The standard library parses each element; this module moves a window over the file. `ijson` (3.6) would read
34 MB in 1.2 s instead of 0.5 s, reject ``NaN``, replace lone surrogates by ``?``, report no position, raise
SystemError for an integer of 5,000 digits, and take gigabytes of memory for 100 KB of ``[``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

_CHUNK = 1 << 20
_WHITE = " \t\r\n"
_ENDS = tuple(",]" + _WHITE)


def json_items(stream: IO[bytes]) -> Iterator[Any]:
    """Yield the elements of the JSON list in a UTF-8 stream.

    Raises:
        ValueError: the stream is not a JSON list; the message names line and character.
    """
    text = _Text(stream)
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        yield text.value()
        while text.take(",]") == ",":
            yield text.value()
    if text.peek():
        raise text.error("unexpected text after the end of the list", 0)


class _Text:
    """A window that moves over the text of a stream."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._parse = json.JSONDecoder().raw_decode
        self._window, self._at = "", 0
        self._before = self._lines = 0  # dropped characters and line ends

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            while self._at < len(self._window):
                if self._window[self._at] not in _WHITE:
                    return self._window[self._at]
                self._at += 1
            if not self._read():
                return ""

    def take(self, allowed: str) -> str:
        """Consume and return the next character. Raise `ValueError` if it is not in ``allowed``."""
        found = self.peek()
        if not found or found not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise self.error(f"expected {wanted}, found {found!r}" if found else f"{wanted} is missing", 0)
        self._at += 1
        return found

    def value(self) -> Any:
        """Consume and return the next value."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._window, self._at)
            except json.JSONDecodeError as error:
                ahead = error.pos - self._at
                if not self._read():
                    raise self.error(error.msg, ahead) from None
                continue
            # A number may continue after the window: 1 of 12, 0 of 0.5.
            if self._window[end : end + 1] in _ENDS or not self._read():
                self._at = end
                return value

    def error(self, message: str, ahead: int) -> ValueError:
        end = self._at + ahead
        line = self._lines + self._window.count("\n", 0, end) + 1
        return ValueError(f"{message}: line {line}, character {self._before + end + 1} of the file")

    def _read(self) -> bool:
        """Drop the consumed part of the window and read on, at least as much as the window holds."""
        data = self._stream.read(max(_CHUNK, 2 * (len(self._window) - self._at)))
        more = self._decode(data, final=not data)
        if not data:
            return False
        self._before += self._at
        self._lines += self._window.count("\n", 0, self._at)
        self._window, self._at = self._window[self._at :] + more, 0
        return True
