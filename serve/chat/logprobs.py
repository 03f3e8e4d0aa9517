"""OpenAI's ``logprobs``: the tokens of an answer's text with their log probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.chat.vocabulary import Vocabulary
from skipvision.engine import TokenLogprob


@dataclass(frozen=True)
class _Placed:
    """A token, where its characters begin and end in the answer, and whether it is the answer's first."""

    token: TokenLogprob
    begin: int
    end: int
    first: bool


class Logprobs:
    """Produces ``logprobs.content`` of one answer during generation.

    Special tokens and the tokens of a stop text are left out. Tokens are held back while the engine holds
    back their text.
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
        """Add generated tokens, and the text that has become final. Return the entries that can be sent."""
        self._sent += len(text)
        words = [token for token in tokens if not self._vocabulary.special(token.token_id)]
        self._held += [self._place(token) for token in words]
        if finish_reason is None:
            ready = [placed for placed in self._held if placed.end <= self._sent]
        elif finish_reason == "stop" and len(words) == len(tokens):  # ended by a stop text
            ready = [placed for placed in self._held if placed.begin < self._sent]
        else:
            ready = self._held
        self._held = self._held[len(ready) :]
        return [self._content(placed) for placed in ready]

    def _place(self, token: TokenLogprob) -> _Placed:
        begin, first, self._begun = self._read, not self._begun, True
        self._read += len(self._decoder.decode(self._vocabulary.bytes_of(token.token_id, first)))
        unfinished = bool(self._decoder.getstate()[0])
        return _Placed(token, begin, self._read + unfinished, first)

    def _content(self, placed: _Placed) -> dict[str, Any]:
        token = placed.token
        return {
            **self._entry(token.token_id, token.logprob, placed.first),
            "top_logprobs": [self._entry(*other, placed.first) for other in token.top],
        }

    def _entry(self, token: int, logprob: float, first: bool) -> dict[str, Any]:
        data = self._vocabulary.bytes_of(token, first)
        # JSON has no −∞; OpenAI sends −9999 instead.
        return {
            "token": data.decode(errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(data),
        }
