"""Requests and responses of chat completions, as OpenAI's clients write and read them.

Field names and meanings: https://platform.openai.com/docs/api-reference/chat. Fields of theirs that change
nothing here are ignored (``user``, ``metadata`` …); those that would change the answer and are not supported
are refused, and so are fields that nobody knows.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
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
"""Objects and lists inside one another in a JSON schema."""

MAX_SCHEMA_BYTES = 2**16
"""Of a JSON schema, written without blanks."""

MAX_MESSAGES = 2048
"""Messages of a request, and parts of a message."""

_MAX_FIELDS = 100
"""Of an object. What is wrong with a field costs more than the field: there must not be millions."""

_MAX_STOP = 1024
"""Characters of a text that ends an answer."""

_Bounded = Field(max_length=MAX_MESSAGES, fail_fast=True)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"an object of {len(value):,} fields; {_MAX_FIELDS} are allowed")
        return value


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{half!r} at {error.start} is half a character: send both surrogates") from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
"""What can be written as UTF-8."""


class ImageUrl(_Strict):
    """An image by URL: ``data:image/…;base64,…``, or http(s) from an allowed host."""

    url: str
    detail: Literal["auto", "low", "high"] = Field("auto", description=IGNORED)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: Text


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]

# Told apart before they are read: what is wrong is said of the one that was meant, not of both.
_StringOrList = Discriminator(lambda value: "list" if isinstance(value, list) else "string")
Content = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[Part], _Bounded, Tag("list")], _StringOrList
]
_StopText = Annotated[Text, Field(min_length=1, max_length=_MAX_STOP)]
Stop = Annotated[
    Annotated[_StopText, Tag("string")] | Annotated[list[_StopText], Field(max_length=4), Tag("list")],
    _StringOrList,
]
Skip = Annotated[
    Annotated[SkipConfig, Tag("config")] | Annotated[Literal["full"], Tag("word")],
    Discriminator(lambda value: "word" if isinstance(value, str) else "config"),
]


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: str | None = Field(None, description=IGNORED)
    # What an answer of OpenAI's clients holds, and is sent back with the next turn.
    refusal: str | None = Field(None, description=IGNORED)
    annotations: list[Any] | None = Field(None, description=IGNORED)
    audio: None = Field(None, description=NOT_SUPPORTED)
    function_call: None = Field(None, description=NOT_SUPPORTED)
    tool_calls: list[Any] | None = Field(None, max_length=0, description=NOT_SUPPORTED)


class JsonSchema(_Strict):
    """A JSON schema that the answer shall have."""

    name: str
    description: str | None = Field(None, description=IGNORED)
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None

    @field_validator("schema_")
    @classmethod
    def _bounded(cls, value: dict[str, Any]) -> dict[str, Any]:
        inside: list[Any] = [value]
        for _ in range(MAX_SCHEMA_DEPTH + 1):
            branches = [each for each in inside if isinstance(each, (dict, list))]
            size = sum(map(len, branches))
            if size > MAX_SCHEMA_BYTES:  # each is one at least; to write all of them would take seconds
                break
            inside = [
                leaf for each in branches for leaf in (each.values() if isinstance(each, dict) else each)
            ]
        else:
            if branches:
                raise ValueError(f"a schema may be {MAX_SCHEMA_DEPTH} levels deep at most")
            size = len(json.dumps(value, separators=(",", ":")))
        if size > MAX_SCHEMA_BYTES:
            raise ValueError(f"a schema of {size:,} bytes or more; {MAX_SCHEMA_BYTES:,} are allowed")
        return value


class ResponseFormat(_Strict):
    """What the answer shall look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = Field(False, description="send one more chunk, with the usage, at the end")
    include_obfuscation: bool = Field(False, description=IGNORED)


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[Message], _Bounded] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="most tokens of an answer (older name)")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="most tokens of an answer")
    temperature: float | None = Field(None, ge=0, le=2, description="1 if not given")
    top_p: float | None = Field(None, ge=0, le=1, description="1 if not given")
    n: int | None = Field(None, ge=1, le=128, description="answers; 1 if not given")
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
    web_search_options: dict[str, Any] | None = Field(None, description=NOT_SUPPORTED)
    modalities: list[Literal["text"]] | None = Field(None, description="only text is supported")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="without tools there is no choice")
    function_call: Literal["none", "auto"] | None = Field(None, description="without functions, likewise")
    metadata: dict[str, Any] | None = Field(None, description=IGNORED)
    parallel_tool_calls: bool | None = Field(None, description=IGNORED)
    prediction: dict[str, Any] | None = Field(None, description=IGNORED)
    prompt_cache_key: str | None = Field(None, description=IGNORED)
    reasoning_effort: str | None = Field(None, description=IGNORED)
    safety_identifier: str | None = Field(None, description=IGNORED)
    service_tier: str | None = Field(None, description=IGNORED)
    store: bool | None = Field(None, description=IGNORED)
    user: str | None = Field(None, description=IGNORED)
    verbosity: str | None = Field(None, description=IGNORED)
    skip: Skip | None = Field(
        None,
        description="SkipConfig of this request, in place of the deployment's; 'full' skips nothing",
    )
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="not OpenAI's; divides logits of seen tokens"
    )
    top_k: int = Field(0, ge=0, lt=2**31, description="not OpenAI's; 0 = all tokens")
