"""A tokenizer's tokens: the bytes that each stands for, and texts that hold none of the special ones."""

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
        longest: characters of the longest token.
    """

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        self.longest = max(map(len, self._tokenizer.get_vocab()))
        self._tokens = llguidance.hf.from_tokenizer(self._tokenizer)
        added = self._tokenizer.added_tokens_decoder
        self._special = {number: token.content for number, token in added.items() if token.special}
        # Placeholders of images and videos need not be special tokens.
        placeholders = (value for name, value in vars(processor).items() if name.endswith("_token"))
        words = {word for word in (*self._special.values(), *placeholders) if word and len(str(word)) > 1}
        longest_first = sorted(map(str, words), key=len, reverse=True)
        self._reserved = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def special(self, token: int) -> bool:
        """It is no text."""
        return token in self._special

    def bytes_of(self, token: int, first: bool) -> bytes:
        """What a token adds to a text; UTF-8, but one character may be several tokens.

        Args:
            token: id.
            first: it begins the text.
        """
        found = bytes(self._tokens.decode_bytes([token]))
        # Decoders that read words as "▁word" drop the blank that a text begins with.
        if first and found.startswith(b" ") and not self._tokenizer.decode([token]).startswith(" "):
            return found[1:]
        return found

    def harmless(self, texts: Sequence[str]) -> list[str]:
        """The same to a reader, but special tokens in them are ordinary text to tokenizer and processor.

        Nor do they make one together: templates may put side by side what stood around an image.
        """
        found = [self._reserved.sub(lambda one: one[0][:1] + _JOINER + one[0][1:], text) for text in texts]
        # Templates may trim them.
        if any(self._reserved.search("".join(map(how, found))) for how in (str, str.strip)):
            found[1:] = [_JOINER + text for text in found[1:]]
        return found
