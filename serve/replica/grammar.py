"""Constrain answers to a JSON schema: llguidance decides which tokens may come next."""

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
        ending: ids of the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ending: list[int]) -> None:
        self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ending or None)
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def adjuster(self, schema: str) -> Callable[[], Adjust]:
        """Return a factory that makes one function per answer, which masks the logits of forbidden tokens.

        Compiling may take a second; it is thread-safe.

        Args:
            schema: the schema as JSON.

        Raises:
            SchemaError: no answer can follow the schema.
        """
        matcher = self._compiled(schema)
        return lambda: _adjust(matcher.deep_copy())

    def check(self, schema: str) -> None:
        """Raise `SchemaError` if no answer can follow a schema. Thread-safe."""
        self._compiled(schema)

    def _compile(self, schema: str) -> llguidance.LLMatcher:
        try:
            # With free whitespace a model may generate blanks without end.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_flexible": False}
            )
            problem = llguidance.LLMatcher.validate_grammar(grammar, self._tokens)
        except ValueError as error:  # Python accepts JSON that llguidance does not, such as NaN
            raise _refused(str(error)) from error
        if problem:
            raise _refused(problem)
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused("it is too complex")
        return matcher


def _adjust(matcher: llguidance.LLMatcher) -> Adjust:
    bit_positions = torch.arange(32, dtype=torch.int32)
    read = 0

    def adjust(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        nonlocal read
        for token in generated[read:]:
            matcher.consume_token(token)
        read = len(generated)
        mask = None if matcher.is_error() else matcher.compute_bitmask()
        if mask is None or matcher.is_error():
            raise _refused("it became too complex during the answer")
        bits = torch.frombuffer(bytearray(mask), dtype=torch.int32)
        allowed = ((bits[:, None] >> bit_positions) & 1).bool().flatten()[: len(logits)]
        missing = torch.zeros(max(len(logits) - len(allowed), 0), dtype=torch.bool)
        return logits.masked_fill(~torch.cat([allowed, missing]).to(logits.device), -torch.inf)

    return adjust


def _refused(reason: str) -> SchemaError:
    """Return an error with a shortened reason: llguidance may quote the whole grammar."""
    line = reason.partition("\n")[0]
    short = line if len(line) <= 200 else f"{line[:199]}…"
    return SchemaError(f"response_format: this JSON schema cannot be followed: {short}")
