"""The tokens of one answer with their log probabilities, as far as they are its text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.chat.vocabulary import Vocabulary
from skipvision.engine import TokenLogprob


@dataclass(frozen=True)
class _Placed:
    """A token, and the characters of the answer that it is."""

    token: TokenLogprob
    begin: int
    end: int
    first: bool


class Logprobs:
    """OpenAI's ``logprobs.content`` of one answer while it is written.

    Special tokens are left out, and so are those of a stop text: tokens are held back as long as the engine
    holds their text back.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[_Placed] = []
        self._read = self._sent = 0
        self._begun = False

    def push(
        self, tokens: Sequence[TokenLogprob], text: str, finish_reason: str | None
    ) -> list[dict[str, Any]]:
        """Tokens that were written, and the text that became certain; returns what can be told."""
        self._sent += len(text)
        words = [token for token in tokens if not self._vocabulary.special(token.token_id)]
        self._held += [self._place(token) for token in words]
        if finish_reason is None:
            told = [placed for placed in self._held if placed.end <= self._sent]
        elif finish_reason == "stop" and len(words) == len(tokens):  # by a stop text
            told = [placed for placed in self._held if placed.begin < self._sent]
        else:
            told = self._held
        self._held = self._held[len(told) :]
        return [self._content(placed) for placed in told]

    def _place(self, token: TokenLogprob) -> _Placed:
        begin, first, self._begun = self._read, not self._begun, True
        self._read += len(self._decoder.decode(self._vocabulary.bytes_of(token.token_id, first)))
        unfinished = bool(self._decoder.getstate()[0])
        return _Placed(token, begin, self._read + unfinished, first)

    def _content(self, placed: _Placed) -> dict[str, Any]:
        token = placed.token
        return {
            **self._named(token.token_id, token.logprob, placed.first),
            "top_logprobs": [self._named(*other, placed.first) for other in token.top],
        }

    def _named(self, token: int, logprob: float, first: bool) -> dict[str, Any]:
        data = self._vocabulary.bytes_of(token, first)
        # JSON has no −∞; OpenAI writes −9999 for what is all but impossible.
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(data),
        }
