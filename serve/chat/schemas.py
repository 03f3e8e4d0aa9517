"""Requests for chat completions, as OpenAI's clients send them.

Field names and meanings: https://platform.openai.com/docs/api-reference/chat. Fields that have no effect here
are ignored (``user``, ``metadata`` …). Unsupported fields that would change the answer are refused, as are
unknown fields. Null means the default of every field that has one. The table in docs/serving.md names every
field of OpenAI's client; a test derives it from that client and from these schemas.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from skipvision import SkipConfig

IGNORED = "accepted and ignored"
NOT_SUPPORTED = "not supported"

MAX_SCHEMA_DEPTH = 64
"""Max nesting of objects and lists in a JSON schema."""

MAX_SCHEMA_BYTES = 2**16
"""Max size of a JSON schema as compact JSON (bytes)."""

MAX_MESSAGES = 2048
"""Max messages of a request, and max parts of a message."""

_MAX_FIELDS = 100
"""Max fields of an object. Validation errors cost more than the fields, so there must not be millions."""

_MAX_STOP = 1024
"""Max length of a stop text (characters)."""

_Bounded = Field(max_length=MAX_MESSAGES, fail_fast=True)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"an object of {len(value):,} fields; at most {_MAX_FIELDS} are allowed")
        return value


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{half!r} at {error.start} is an unpaired surrogate: send valid Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
"""A string that can be encoded as UTF-8."""


class ImageUrl(_Strict):
    """An image by URL: ``data:image/…;base64,…``, or http(s) from an allowed host."""

    url: str
    detail: str | None = Field(None, description=IGNORED)


class _Part(_Strict):
    prompt_cache_breakpoint: dict[str, Any] | None = Field(None, description=IGNORED)


class TextPart(_Part):
    """A part of a message that is text."""

    type: Literal["text"]
    text: Text


class RefusalPart(_Strict):
    """The words with which an assistant refused to answer; read as its text."""

    type: Literal["refusal"]
    refusal: Text


class ImagePart(_Part):
    """A part of a message that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]

# Discriminated before validation, so that errors are about the alternative that was meant.
_StringOrList = Discriminator(lambda value: "list" if isinstance(value, list) else "string")
Content = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[Part], _Bounded, Tag("list")], _StringOrList
]
_StopText = Annotated[Text, Field(min_length=1, max_length=_MAX_STOP)]
Stop = Annotated[
    Annotated[_StopText, Tag("string")] | Annotated[list[_StopText], Field(max_length=4), Tag("list")],
    _StringOrList,
]


def _without_nulls(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


Skip = Annotated[
    Annotated[SkipConfig, BeforeValidator(_without_nulls), Tag("config")]
    | Annotated[Literal["full"], Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "config"),
]


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: str | None = Field(None, description=IGNORED)
    # Clients send the fields of an answer back with the next turn.
    refusal: Text | None = Field(None, description="an assistant's refusal to answer; read as its text")
    annotations: list[Any] | None = Field(None, description=IGNORED)
    audio: None = Field(None, description=NOT_SUPPORTED)
    function_call: None = Field(None, description=NOT_SUPPORTED)
    tool_calls: list[Any] | None = Field(None, max_length=0, description=NOT_SUPPORTED)

    @model_validator(mode="after")
    def _refusals_by_the_assistant(self) -> Self:
        parts = self.content if isinstance(self.content, list) else []
        if self.role != "assistant" and (self.refusal or any(isinstance(x, RefusalPart) for x in parts)):
            raise ValueError(f"a refusal in a turn of the {self.role}: only the assistant's turns have them")
        return self


class JsonSchema(_Strict):
    """A JSON schema that the answer must follow."""

    name: str
    description: str | None = Field(None, description=IGNORED)
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="default: any JSON")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        inside: list[Any] = [value]
        for _ in range(MAX_SCHEMA_DEPTH + 1):
            branches = [each for each in inside if isinstance(each, (dict, list))]
            size = sum(map(len, branches))
            if size > MAX_SCHEMA_BYTES:  # each takes a byte or more; serializing them all would take seconds
                break
            inside = [
                leaf for each in branches for leaf in (each.values() if isinstance(each, dict) else each)
            ]
        else:
            if branches:
                raise ValueError(f"the schema is too deep; at most {MAX_SCHEMA_DEPTH} levels are allowed")
            size = len(json.dumps(value, separators=(",", ":")))
        if size > MAX_SCHEMA_BYTES:
            raise ValueError(f"a schema of {size:,} bytes or more; at most {MAX_SCHEMA_BYTES:,} are allowed")
        return value


class ResponseFormat(_Strict):
    """The format that an answer must have: text, JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(None, description="send a final chunk with the usage")
    include_obfuscation: bool | None = Field(None, description=IGNORED)


class ChatRequest(_Strict):
    """The request body of ``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[Message], _Bounded] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="max tokens of an answer (older name)")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="max tokens of an answer")
    temperature: float | None = Field(None, ge=0, le=2, description="default 1")
    top_p: float | None = Field(
        None, ge=0, le=1, description="default: that of the model's generation_config, else 1"
    )
    n: int | None = Field(None, ge=1, le=128, description="number of answers; default 1")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: float | None = Field(None, description="only 0 is supported")
    presence_penalty: float | None = Field(None, description="only 0 is supported")
    logit_bias: dict[str, Any] | None = Field(None, description=NOT_SUPPORTED)
    tools: list[Any] | None = Field(None, description=NOT_SUPPORTED)
    functions: list[Any] | None = Field(None, description=NOT_SUPPORTED)
    audio: dict[str, Any] | None = Field(None, description=NOT_SUPPORTED)
    moderation: dict[str, Any] | None = Field(None, description=NOT_SUPPORTED)
    web_search_options: dict[str, Any] | None = Field(None, description=NOT_SUPPORTED)
    modalities: list[Literal["text"]] | None = Field(None, description="only text is supported")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="no effect without tools")
    function_call: Literal["none", "auto"] | None = Field(None, description="no effect without functions")
    metadata: dict[str, Any] | None = Field(None, description=IGNORED)
    parallel_tool_calls: bool | None = Field(None, description=IGNORED)
    prediction: dict[str, Any] | None = Field(None, description=IGNORED)
    prompt_cache_key: str | None = Field(None, description=IGNORED)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=IGNORED)
    prompt_cache_retention: str | None = Field(None, description=IGNORED)
    reasoning_effort: str | None = Field(None, description=IGNORED)
    safety_identifier: str | None = Field(None, description=IGNORED)
    service_tier: str | None = Field(None, description=IGNORED)
    store: bool | None = Field(None, description=IGNORED)
    user: str | None = Field(None, description=IGNORED)
    verbosity: str | None = Field(None, description=IGNORED)
    skip: Skip | None = Field(
        None,
        description="SkipConfig of this request instead of the deployment's; 'full' skips nothing",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.1,
        le=10,
        description="not in OpenAI's API; divides logits of earlier tokens; default: that of the model's "
        "generation_config, else 1",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="not in OpenAI's API; default: that of the model's generation_config, else 0 = all",
    )
