"""Format the engine's output as chat completions and their chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pipelines.data.special_tokens import Unescaping
from serve.chat.logprobs import Logprobs
from serve.chat.schemas import ChatRequest
from serve.chat.vocabulary import Vocabulary
from skipvision.engine import Choice, Chunk, Completion, TokenLogprob, Usage

_FINISH = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "stop"}
"""OpenAI's finish reason for each of the engine's."""


@dataclass
class ChatResponse:
    """The response to one request, whole or in chunks.

    Attributes:
        id: id of the completion.
        created: Unix time (s).
        model: model name from the request.
        vocabulary: tokens of the model.
        logprobs: whether the request wants log probabilities.
    """

    id: str
    created: int
    model: str
    vocabulary: Vocabulary
    logprobs: bool
    _tokens: dict[int, Logprobs] = field(default_factory=dict, init=False)
    _texts: dict[int, Unescaping] = field(default_factory=dict, init=False)

    @classmethod
    def to(cls, body: ChatRequest, vocabulary: Vocabulary) -> Self:
        """Return the response to a request, under a new id."""
        id_ = f"chatcmpl-{uuid.uuid4().hex}"
        return cls(id_, int(time.time()), body.model, vocabulary, bool(body.logprobs))

    def completion(self, completion: Completion) -> dict[str, Any]:
        """Return the response body of a request that does not stream."""
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(choice) for choice in completion.choices],
            "usage": _usage(completion.usage),
        }

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return the first chunk of each choice, which has the role."""
        return [
            self._delta(index, {"role": "assistant", "content": ""}, None, None) for index in range(choices)
        ]

    def chunk(self, chunk: Chunk) -> dict[str, Any] | None:
        """Return what a step added to a choice; None if nothing can be sent yet."""
        logprobs = self._logprobs(chunk.index, chunk.logprobs or (), chunk.text, chunk.finish_reason)
        unescaping = self._texts.setdefault(chunk.index, self.vocabulary.unescaping())
        text = unescaping.push(chunk.text, last=chunk.finish_reason is not None)
        if not text and chunk.finish_reason is None and not (logprobs and logprobs["content"]):
            return None
        reason = None if chunk.finish_reason is None else _FINISH.get(chunk.finish_reason)
        delta = {"content": text} if text else {}
        return self._delta(chunk.index, delta, reason, logprobs)

    def usage(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk after the last one, which has the usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {
                "role": "assistant",
                "content": self.vocabulary.unescape(choice.text),
                "refusal": None,
            },
            "finish_reason": _FINISH.get(choice.finish_reason, "stop"),
            "logprobs": self._logprobs(
                choice.index, choice.logprobs or (), choice.text, choice.finish_reason
            ),
        }

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None,
        logprobs: dict[str, Any] | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": reason,
            "logprobs": logprobs,
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _logprobs(
        self, index: int, tokens: Sequence[TokenLogprob], text: str, reason: str | None
    ) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        choice = self._tokens.setdefault(index, Logprobs(self.vocabulary))
        return {"content": choice.push(tokens, text, reason), "refusal": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's usage, with the counts of visual tokens."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "visual_tokens": {
            "total": usage.visual_total,
            "retained": usage.visual_retained,
            "skipped": usage.visual_skipped,
            "cached": usage.visual_cached,
        },
        "kv_bytes": usage.kv_bytes,
        "prefix_hit": usage.prefix_hit,
    }
