"""Requests and responses of chat completions, as OpenAI's clients write and read them.

Field names and meanings: https://platform.openai.com/docs/api-reference/chat. Fields of theirs that make no
sense here and change nothing are ignored (``user``, ``metadata`` …); those that would change the answer and
are not supported are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from skipvision import SkipConfig


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class ImageUrl(_Strict):
    """An image by URL: ``data:image/…;base64,…``, or http(s) from an allowed host."""

    url: str
    detail: Literal["auto", "low", "high"] = Field("auto", description="accepted and ignored")


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


class JsonSchema(_Strict):
    """A JSON schema that the answer shall have."""

    name: str
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the answer shall look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = Field(False, description="send one more chunk, with the usage, at the end")


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="most tokens of an answer (older name)")
    max_completion_tokens: int | None = Field(None, ge=1, description="most tokens of an answer")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = Field(None, max_length=4)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: float = Field(0.0, description="only 0 is supported")
    presence_penalty: float = Field(0.0, description="only 0 is supported")
    logit_bias: dict[str, float] | None = Field(None, description="not supported")
    tools: list[Any] | None = Field(None, description="not supported")
    skip: SkipConfig | Literal["full"] | None = Field(
        None,
        description="SkipConfig of this request, in place of the deployment's; 'full' skips nothing",
    )
    repetition_penalty: float = Field(1.0, gt=0, description="not OpenAI's; divides logits of seen tokens")
    top_k: int = Field(0, ge=0, description="not OpenAI's; 0 = all tokens")
