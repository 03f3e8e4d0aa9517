"""Tokens to text as they come: no split characters, and nothing that may be the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "�"


class TextStream:
    """The text of one answer while it is written.

    Args:
        decode: token ids to text.
        stop: texts that end the answer.

    Attributes:
        text: what has been handed out so far; after `finish`, all of it.
        stopped: a stop text was met.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        # Tokens before _begin are text for good; those up to _read are text that may still be held back.
        self._begin = self._read = 0
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now."""
        self._ids.append(token)
        return self._hand_out(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """No token comes any more; returns the text that was held back."""
        return "" if self.stopped else self._hand_out(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        # Decoders strip or add blanks at the beginning, so a token is read with those before it.
        before = self._decode(self._ids[self._begin : self._read])
        whole = self._decode(self._ids[self._begin :])
        if whole.endswith(_INCOMPLETE) and not final:
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def _hand_out(self, new: str, final: bool) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            new, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else max((_begun(self._held, stop) for stop in self._stop), default=0)
            cut = len(self._held) - keep
            new, self._held = self._held[:cut], self._held[cut:]
        self.text += new
        return new


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
