"""Schemas of responses for the OpenAPI page. `serve.chat.response` produces the responses themselves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorObject(BaseModel):
    """An error in OpenAI's format."""

    message: str
    type: str
    param: str | None = Field(description="the invalid field of the request")
    code: str | None = Field(description="machine-readable reason")


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorObject


class AssistantMessage(BaseModel):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str
    refusal: None


class TopLogprob(BaseModel):
    """A candidate for the next token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A generated token with its log probability."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log probabilities of one answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class ChatChoice(BaseModel):
    """One answer of the ``n`` that were requested."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None


class VisualTokens(BaseModel):
    """Counts of the images' tokens."""

    total: int
    retained: int
    skipped: int = Field(description="after merging")
    cached: int = Field(description="entries of the images in the KV cache after prefill")


class ChatUsage(BaseModel):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    visual_tokens: VisualTokens
    kv_bytes: int = Field(description="size of the prompt's keys and values (bytes)")
    prefix_hit: bool = Field(description="whether the images came from the prefix cache")


class ChatCompletion(BaseModel):
    """The response of a request that does not stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


def _error(description: str) -> dict[str, Any]:
    return {"model": ErrorBody, "description": description}


KEYED: dict[int | str, dict[str, Any]] = {
    401: _error("no API key, or an unknown one"),
    429: _error("too many requests at once; try again after Retry-After"),
    500: _error("the server failed"),
    503: _error("no process is alive to answer; try again after Retry-After"),
}
"""Error responses of routes that need a key."""

METRICS = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **KEYED}
"""Responses of the page for Prometheus."""

NAMED = {
    **KEYED,
    404: _error("there is no such model"),
    503: _error("no process is alive to answer, or the adapter is not loaded; try again after Retry-After"),
}
"""Error responses of routes that name a model."""

WITH_BODY = {
    400: _error("an invalid request; param names the field"),
    413: _error("the body is too large"),
    504: _error("no answer within the time limit"),
    **NAMED,
}
"""Error responses of routes with a body."""

HEALTH: dict[int | str, dict[str, Any]] = {
    503: {"description": "a model has no engine that responds", "content": {"application/json": {}}}
}

CHAT = {
    200: {
        "model": ChatCompletion,
        "description": "the answer; with stream, its chunks as server-sent events",
        "content": {"text/event-stream": {}},
    },
    **WITH_BODY,
}
