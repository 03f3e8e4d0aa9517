"""A tokenizer's tokens: the bytes of each, and texts in which special tokens are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llguidance.hf

from pipelines.data.special_tokens import SpecialTokens, Unescaping


class Vocabulary:
    """The tokens of one model.

    Args:
        processor: with a fast Hugging Face tokenizer.

    Attributes:
        longest: length of the longest token (characters).
    """

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        self.longest = max(map(len, self._tokenizer.get_vocab()))
        self._tokens = llguidance.hf.from_tokenizer(self._tokenizer)
        self._special = SpecialTokens(processor)

    def special(self, token: int) -> bool:
        """Return whether a token is special, so that it has no text."""
        return token in self._special.texts

    def bytes_of(self, token: int, first: bool) -> bytes:
        """Return the UTF-8 bytes that a token adds to a text. A character may span several tokens.

        Args:
            token: id.
            first: whether the token begins the text.
        """
        data = bytes(self._tokens.decode_bytes([token]))
        # Decoders of "▁word" tokens drop the blank at the beginning of a text.
        if first and data.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
            return data[1:]
        return data

    def unescape(self, text: str) -> str:
        """Return an answer without the characters that `escape` put into texts; see `SpecialTokens`."""
        return self._special.unescape(text)

    def unescaping(self) -> Unescaping:
        """Return the incremental form of `unescape`, for streamed answers."""
        return Unescaping(self._special)

    def escape(self, texts: Sequence[str]) -> list[str]:
        """Return the texts of one message with special tokens broken up; see `SpecialTokens.escape`."""
        return self._special.escape(texts)
