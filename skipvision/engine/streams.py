"""Decode tokens as they come, without splitting characters or releasing the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "�"


class TextStream:
    """The text of one answer while it is generated.

    Args:
        decode: token ids to text.
        stop: strings that end the answer.

    Attributes:
        text: the text released so far; all of it after `finish`.
        stopped: whether a stop string has occurred.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        # Tokens before _begin need not be decoded again. Those up to _read have been decoded.
        self._begin = self._read = 0
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, *tokens: int) -> str:
        """Add tokens; returns the text that is now certain."""
        self._ids += tokens
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """End the stream; returns the text that was held back."""
        return "" if self.stopped else self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        # Tokenizers strip or add blanks at the beginning of a text, so decode some earlier tokens as well.
        before = self._decode(self._ids[self._begin : self._read])
        whole = self._decode(self._ids[self._begin :])
        if whole.endswith(_INCOMPLETE) and not final:
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            new, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - keep
            new, self._held = self._held[:cut], self._held[cut:]
        self.text += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
