"""What answers hold, for the OpenAPI page; `serve.chat.response` writes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorObject(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = Field(description="field of the request")
    code: str | None = Field(description="for programs to tell errors apart")


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorObject


class AssistantMessage(BaseModel):
    """What the model wrote."""

    role: Literal["assistant"]
    content: str
    refusal: None


class TopLogprob(BaseModel):
    """A token that could have been taken."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """One that was."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Tokens of one answer."""

    content: list[TokenLogprob]
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None


class VisualTokens(BaseModel):
    """What became of the images' tokens."""

    total: int
    retained: int
    skipped: int = Field(description="after merging")
    cached: int = Field(description="entries that the images left in the KV cache")


class ChatUsage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    visual_tokens: VisualTokens
    kv_bytes: int = Field(description="keys and values of the prompt (bytes)")
    prefix_hit: bool = Field(description="the images came from the prefix cache")


class ChatCompletion(BaseModel):
    """An answer in one piece."""

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
    429: _error("too many requests at once; Retry-After says when"),
    500: _error("the server failed"),
    503: _error("nobody lives to answer; Retry-After says when to ask"),
}
"""Where keys are asked for."""

METRICS = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **KEYED}
"""Of the page for Prometheus."""

NAMED = {
    **KEYED,
    404: _error("there is no such model"),
    503: _error("nobody lives to answer, or no engine has the adapter yet; Retry-After says when to ask"),
}
"""Where a model is named."""

ASKED = {
    400: _error("a request that is wrong; param says where"),
    413: _error("a body that is too large"),
    504: _error("no engine answered in time"),
    **NAMED,
}
"""Where there is a body."""

HEALTH: dict[int | str, dict[str, Any]] = {
    503: {"description": "a model has no engine that answers", "content": {"application/json": {}}}
}

CHAT = {
    200: {
        "model": ChatCompletion,
        "description": "the answer; with stream, its chunks as server-sent events",
        "content": {"text/event-stream": {}},
    },
    **ASKED,
}
