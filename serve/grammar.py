"""Answers that follow a JSON schema: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import torch

from skipvision.errors import GenerationError, InputError

Adjust = Callable[[list[int], torch.Tensor], torch.Tensor]

ANY_OBJECT = {"type": "object"}
"""The schema of response_format json_object."""


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

    def adjuster(self, schema: dict[str, Any]) -> Callable[[], Adjust]:
        """What makes, for each answer, the function that leaves only logits of tokens that may come next.

        Raises:
            InputError: the schema cannot be followed.
        """
        grammar = self._compiled(json.dumps(schema, sort_keys=True))
        return lambda: self._adjust(grammar)

    def _compile(self, schema: str) -> str:
        grammar = str(llguidance.LLMatcher.grammar_from_json_schema(schema))
        wrong = llguidance.LLMatcher.validate_grammar(grammar, self._tokens)
        if wrong:
            raise InputError(f"response_format: this JSON schema cannot be followed: {wrong}")
        return grammar

    def _adjust(self, grammar: str) -> Adjust:
        matcher = llguidance.LLMatcher(self._tokens, grammar)
        places = torch.arange(32, dtype=torch.int32)
        read = 0

        def adjust(written: list[int], logits: torch.Tensor) -> torch.Tensor:
            nonlocal read
            for token in written[read:]:
                matcher.consume_token(token)
            read = len(written)
            if matcher.is_error():
                raise GenerationError(f"the answer left its JSON schema: {matcher.get_error()}")
            bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.int32)
            allowed = ((bits[:, None] >> places) & 1).bool().flatten()[: len(logits)]
            missing = torch.zeros(max(len(logits) - len(allowed), 0), dtype=torch.bool)
            return logits.masked_fill(~torch.cat([allowed, missing]).to(logits.device), -torch.inf)

        return adjust
