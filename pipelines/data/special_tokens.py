"""Keep special tokens out of texts: ``</s>`` in a row or a request is text, and not the end of an answer.

Tokenizers turn the text of a special token into the token itself wherever it occurs, and processors expand
their image token. Only the chat template may write such tokens. Every text from outside therefore passes
through `SpecialTokens.escape` before it meets a template: in training, captioning, scoring and serving.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

JOINER = "\N{WORD JOINER}"
"""The invisible character that breaks up a special token. It allows no line break and has no width."""


class SpecialTokens:
    """The special tokens of a processor and of its tokenizer.

    Attributes:
        texts: the text of each special token of the tokenizer, by id.
    """

    def __init__(self, processor: Any) -> None:
        added: Mapping[int, Any] = processor.tokenizer.added_tokens_decoder
        self.texts = {number: str(token.content) for number, token in added.items() if token.special}
        # The placeholders of images and videos are not always special tokens.
        placeholders = (value for name, value in vars(processor).items() if name.endswith("_token"))
        words = {str(word) for word in (*self.texts.values(), *placeholders) if word and len(str(word)) > 1}
        longest_first = sorted(words, key=len, reverse=True)
        self._reserved = _any_of(longest_first)
        broken = [_broken(word) for word in longest_first]
        self._broken = _any_of(broken)
        self._beginnings = {word[:end] for word in broken for end in range(1, len(word))}

    def escape(self, texts: Sequence[str]) -> list[str]:
        """Return the texts of one message with special tokens broken up by `JOINER`.

        Tokenizer and processor then treat them as ordinary text. Special tokens that arise when a template
        joins the texts around an image are broken up too.
        """
        escaped = [self._reserved.sub(lambda m: _broken(m[0]), text) for text in texts]
        # A template may strip the texts before it joins them.
        if any(self._reserved.search("".join(map(join, escaped))) for join in (str, str.strip)):
            escaped[1:] = [JOINER + text for text in escaped[1:]]
        return escaped

    def unescape(self, text: str) -> str:
        """Restore the special tokens that `escape` broke up and the model repeated. Other joiners stay."""
        return self._broken.sub(lambda m: m[0].replace(JOINER, ""), text)

    def beginning_at_end(self, text: str) -> int:
        """Return how many characters at the end of a text may begin a special token that is broken up."""
        longest = min(len(text), max(map(len, self._beginnings), default=0))
        return next((n for n in range(longest, 0, -1) if text[-n:] in self._beginnings), 0)


class Unescaping:
    """Applies `SpecialTokens.unescape` to an answer that arrives in pieces."""

    def __init__(self, special: SpecialTokens) -> None:
        self._special, self._held = special, ""

    def push(self, text: str, *, last: bool) -> str:
        """Return what can be shown after one more piece of text."""
        text = self._held + text
        end = len(text) if last else len(text) - self._special.beginning_at_end(text)
        self._held = text[end:]
        return self._special.unescape(text[:end])


def _broken(word: str) -> str:
    return word[:1] + JOINER + word[1:]


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


@lru_cache(maxsize=8)
def special_tokens_of(processor: Any) -> SpecialTokens:
    """Return the special tokens of a processor that does not change any more; cached."""
    return SpecialTokens(processor)


def without_joiners(text: str) -> str:
    """Return a text without `JOINER`, which a model may have learnt from escaped answers."""
    return text.replace(JOINER, "")
