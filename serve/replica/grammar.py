"""Answers that follow a JSON schema: which tokens may come next, by llguidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import torch

from serve.errors import SchemaError

Adjust = Callable[[list[int], torch.Tensor], torch.Tensor]


class Grammars:
    """JSON schemas over the tokens of one tokenizer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocabulary: number of logits.
        ending: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ending: list[int]) -> None:
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ending or None)
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def adjuster(self, schema: str) -> Callable[[], Adjust]:
        """What makes, for each answer, the function that leaves only logits of tokens that may come next.

        It may take a second; any thread can do it.

        Args:
            schema: as JSON.

        Raises:
            SchemaError: it cannot be followed.
        """
        matcher = self._compiled(schema)
        return lambda: _adjust(matcher.deep_copy())

    def _compile(self, schema: str) -> llguidance.LLMatcher:
        try:
            # Blanks that are free would be written without end.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_flexible": False}
            )
            wrong = llguidance.LLMatcher.validate_grammar(grammar, self._tokens)
        except ValueError as error:  # JSON as Python reads it, which the library does not
            raise _refused(str(error)) from error
        if wrong:
            raise _refused(wrong)
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused("it is too complex")
        return matcher


def _adjust(matcher: llguidance.LLMatcher) -> Adjust:
    places = torch.arange(32, dtype=torch.int32)
    read = 0

    def adjust(written: list[int], logits: torch.Tensor) -> torch.Tensor:
        nonlocal read
        for token in written[read:]:
            matcher.consume_token(token)
        read = len(written)
        mask = None if matcher.is_error() else matcher.compute_bitmask()
        if mask is None or matcher.is_error():
            raise _refused("it became too complex while the answer was written")
        bits = torch.frombuffer(bytearray(mask), dtype=torch.int32)
        allowed = ((bits[:, None] >> places) & 1).bool().flatten()[: len(logits)]
        missing = torch.zeros(max(len(logits) - len(allowed), 0), dtype=torch.bool)
        return logits.masked_fill(~torch.cat([allowed, missing]).to(logits.device), -torch.inf)

    return adjust


def _refused(reason: str) -> SchemaError:
    """The library's own words are shortened: they may quote the whole grammar."""
    line = reason.partition("\n")[0]
    short = line if len(line) <= 200 else f"{line[:199]}…"
    return SchemaError(f"response_format: this JSON schema cannot be followed: {short}")
