"""A tokenizer's tokens: the bytes of each, and texts in which special tokens are escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import llguidance.hf

_JOINER = "\N{WORD JOINER}"


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
        added = self._tokenizer.added_tokens_decoder
        self._special = {number: token.content for number, token in added.items() if token.special}
        # The placeholders of images and videos are not always special tokens.
        placeholders = (value for name, value in vars(processor).items() if name.endswith("_token"))
        words = {word for word in (*self._special.values(), *placeholders) if word and len(str(word)) > 1}
        longest_first = sorted(map(str, words), key=len, reverse=True)
        self._reserved = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def special(self, token: int) -> bool:
        """Return whether a token is special, so that it has no text."""
        return token in self._special

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

    def escape(self, texts: Sequence[str]) -> list[str]:
        """Return the texts with special tokens broken up by an invisible character.

        Tokenizer and processor then treat them as ordinary text. Special tokens that arise when a template
        joins the texts around an image are broken up too.
        """
        escaped = [self._reserved.sub(lambda m: m[0][:1] + _JOINER + m[0][1:], text) for text in texts]
        # A template may strip the texts before it joins them.
        if any(self._reserved.search("".join(map(join, escaped))) for join in (str, str.strip)):
            escaped[1:] = [_JOINER + text for text in escaped[1:]]
        return escaped
