"""Every field of OpenAI's client is honoured, ignored or refused, as the table in docs/serving.md says.

The fields come from the installed package `openai`, so a field of its next version fails here until the table
has it.
"""

import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from openai.types.chat import completion_create_params as params
from pydantic import BaseModel, ValidationError

from serve.chat.request import conversation, refuse_unsupported, sampling, schema
from serve.chat.schemas import IGNORED, ChatRequest, Message
from serve.problem import Problem

DOCS = Path(__file__).parents[3] / "docs/serving.md"
TEXT = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
NO_SUFFIX = "ChatCompletion|MessageParam|Param$"


def members(kind):
    """The members of a union; lists by the members of their items."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated or str(origin).endswith("Required"):
        return members(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [member for each in arguments for member in members(each)]
    return [kind]


def fields(kind, path=""):
    """Yield the path and type of each field of a TypedDict, and of those inside."""
    for name, annotation in typing.get_type_hints(kind).items():
        yield f"{path}{name}", annotation
        for inner in nested(annotation):
            role = re.sub(NO_SUFFIX, "", inner.__name__).lower()
            yield from fields(inner, f"{path}{name}[{role}]." if name == "messages" else f"{path}{name}.")


def nested(annotation):
    for member in members(annotation):
        if typing.get_origin(member) in (list, Iterable, Sequence):
            yield from nested(typing.get_args(member)[0])
        elif hasattr(member, "__required_keys__"):
            yield member


SDK = dict(fields(params.CompletionCreateParamsNonStreaming))
"""Path of each field of the client, such as ``messages[user].content.image_url.detail``."""


def table():
    """Treatment by pattern, from the rows of the table in the docs."""
    text = DOCS.read_text()
    rows = re.findall(r"^\| (honoured|ignored|refused) \| (.*?) \|$", text, re.MULTILINE)
    return {name: kind for kind, cell in rows for name in re.findall(r"`([\w.\[\]|]+)`", cell)}


TABLE = table()


def treatment(path):
    """The row of a field: its own, or that of an ignored or refused field or message that contains it."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        for name in (prefix, re.sub(r"\[\w+\]", "", prefix)):
            if name in TABLE and (end == len(parts) or TABLE[name] != "honoured"):
                return TABLE[name]
    return None


@pytest.mark.parametrize("path", sorted(SDK))
def test_the_table_has_every_field_of_the_client(path):
    assert treatment(path) in ("honoured", "ignored", "refused"), f"{path} is new: add it to the table"


def test_the_table_has_no_other_fields():
    known = (
        set(SDK) | {path.partition(".")[0] for path in SDK} | {re.sub(r"\[\w+\]", "", path) for path in SDK}
    )
    assert set(TABLE) - known == set(EXTRA)


EXTRA = ("skip", "top_k", "repetition_penalty")
"""Fields that OpenAI's client sends as ``extra_body``."""


def body(**changes):
    return {**TEXT, **changes}


def turn(content, role="user", **fields):
    return body(messages=[{"role": role, "content": content, **fields}])


def refusal(request):
    """Why a request is refused; None if it is not."""
    try:
        refuse_unsupported(ChatRequest.model_validate(request))
    except (ValidationError, Problem) as error:
        return str(error)
    return None


BREAK = {"mode": "explicit", "ttl": "30m"}
SCHEMA = {"name": "x", "description": "d", "schema": {}, "strict": True}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

ACCEPTED = {
    "image": turn([IMAGE]),
    "detail": turn([{**IMAGE, "image_url": {**IMAGE["image_url"], "detail": "original"}}]),
    "detail null": turn([{**IMAGE, "image_url": {**IMAGE["image_url"], "detail": None}}]),
    "breakpoint in a text": turn([{"type": "text", "text": "a", "prompt_cache_breakpoint": BREAK}]),
    "breakpoint in an image": turn([{**IMAGE, "prompt_cache_breakpoint": BREAK}]),
    "prompt_cache_key": body(prompt_cache_key="k"),
    "prompt_cache_options": body(prompt_cache_options={"mode": "implicit", "ttl": "30m"}),
    "prompt_cache_retention": body(prompt_cache_retention="24h"),
    "refusal part": turn([{"type": "refusal", "refusal": "no"}], "assistant"),
    "refusal": turn(None, "assistant", refusal="no"),
    "empty tool calls": turn("a", "assistant", tool_calls=[], function_call=None, audio=None),
    "developer": turn("a", "developer", name="n"),
    "json schema": body(response_format={"type": "json_schema", "json_schema": SCHEMA}),
    "stream": body(stream=True, stream_options={"include_usage": True, "include_obfuscation": True}),
    **{f"reasoning_effort {word}": body(reasoning_effort=word) for word in ("none", "xhigh", "max")},
    **{f"service_tier {word}": body(service_tier=word) for word in ("auto", "flex", "fast")},
    **{f"verbosity {word}": body(verbosity=word) for word in ("low", "high")},
    "metadata": body(metadata={"a": "b"}),
    "store": body(store=True),
    "user": body(user="u", safety_identifier="s", parallel_tool_calls=True),
    "prediction": body(prediction={"type": "content", "content": "x"}),
    "neutral values": body(tools=[], tool_choice="none", modalities=["text"], presence_penalty=0.0),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_requests_of_the_client_are_accepted(name):
    assert refusal(ACCEPTED[name]) is None


REFUSED = {
    "audio": (body(audio={"format": "wav", "voice": "alloy"}), "not supported"),
    "moderation": (body(moderation={"model": "m"}), "not supported"),
    "tools": (body(tools=[{"type": "function"}]), "not supported"),
    "functions": (body(functions=[{"name": "f"}]), "not supported"),
    "tool_choice": (body(tool_choice="required"), "'none' or 'auto'"),
    "function_call": (body(function_call={"name": "f"}), "'none' or 'auto'"),
    "logit_bias": (body(logit_bias={"1": 1}), "not supported"),
    "frequency_penalty": (body(frequency_penalty=1), "not supported"),
    "web_search_options": (body(web_search_options={"search_context_size": "low"}), "not supported"),
    "modalities": (body(modalities=["audio"]), "'text'"),
    "input_audio": (turn([{"type": "input_audio", "input_audio": {}}]), "'input_audio'"),
    "file": (turn([{"type": "file", "file": {}}]), "'file'"),
    "tool": (turn("x", "tool", tool_call_id="1"), "'system', 'developer', 'user' or 'assistant'"),
    "tool_calls": (turn(None, "assistant", tool_calls=[CALL]), "at most 0 items"),
    "message audio": (turn(None, "assistant", audio={"id": "1"}), "should be None"),
    "a user's refusal": (turn([{"type": "refusal", "refusal": "no"}]), "only the assistant's turns"),
    "a system's refusal": (turn("x", "system", refusal="no"), "only the assistant's turns"),
}


def literals(path):
    return [
        value
        for member in members(SDK[path])
        if typing.get_origin(member) is typing.Literal
        for value in typing.get_args(member)
    ]


@pytest.mark.parametrize("path", [path for path in SDK if "." not in path and treatment(path) == "ignored"])
def test_every_value_of_an_ignored_field_is_accepted(path):
    assert [refusal(body(**{path: value})) for value in literals(path)] == [None] * len(literals(path))


def test_every_detail_of_an_image_is_accepted():
    details = literals("messages[user].content.image_url.detail")
    assert "original" in details
    for detail in [*details, "a value of the next client"]:
        image = {"url": "data:,", "detail": detail}
        assert refusal(turn([{"type": "image_url", "image_url": image}])) is None


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_would_change_the_answer_are_refused_with_the_reason(name):
    request, reason = REFUSED[name]
    assert reason in (refusal(request) or "")


def test_ignored_fields_are_those_that_the_schema_calls_ignored():
    ignored = {name for name, field in ChatRequest.model_fields.items() if field.description == IGNORED}
    assert {name for name in ignored if treatment(name) != "ignored"} == set()
    others = {name for name in ChatRequest.model_fields if treatment(name) == "ignored"} - ignored
    assert others == set()


# ------------------------------------------------------------------------------------------------ null


def optional(model):
    """Yield each field of a model that has a default."""
    for name, field in model.model_fields.items():
        if not field.is_required():
            yield model, field.alias or name


MINIMAL = {
    "ChatRequest": TEXT,
    "Message": {"role": "user"},
    "TextPart": {"type": "text", "text": "a"},
    "ImagePart": IMAGE,
    "ImageUrl": {"url": "data:,"},
    "JsonSchema": {"name": "x"},
    "ResponseFormat": {"type": "text"},
    "StreamOptions": {},
}


def models(kind=ChatRequest, seen=None):
    seen = {} if seen is None else seen
    seen[kind.__name__] = kind
    for field in kind.model_fields.values():
        for inner in inside(field.annotation):
            if inner.__module__ == ChatRequest.__module__ and inner.__name__ not in seen:
                models(inner, seen)
    return seen


def inside(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for each in typing.get_args(annotation):
        yield from inside(each)


NULLS = [(kind, name) for model in models().values() for kind, name in optional(model)]


@pytest.mark.parametrize(("kind", "name"), NULLS, ids=lambda value: getattr(value, "__name__", value))
def test_null_is_the_default_of_every_field(kind, name):
    without = MINIMAL[kind.__name__]
    assert kind.model_validate({**without, name: None}) == kind.model_validate(without)


def test_null_is_the_default_of_every_field_of_skip():
    from skipvision import SkipConfig

    for name in SkipConfig.model_fields:
        request = ChatRequest.model_validate(body(skip={name: None, "merge": "mean"} | {"merge": None}))
        assert request.skip == SkipConfig()


def test_nulls_give_the_default_sampling():
    names = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    nulls = ChatRequest.model_validate(body(**dict.fromkeys(names)))
    assert sampling(nulls, 10, 10) == sampling(ChatRequest.model_validate(TEXT), 10, 10)
    assert schema(nulls) is None


class Plain:
    def escape(self, texts):
        return list(texts)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": [{"type": "text", "text": "a "}, {"type": "refusal", "refusal": "no"}]}, "a no"),
        ({"content": "a"}, "a"),
    ],
)
def test_refusals_are_text_of_the_assistant(message, text):
    assert Message.model_validate({"role": "assistant", **message})
    request = ChatRequest(model="m", messages=[{"role": "assistant", **message}])
    messages, _ = conversation(request, Plain())
    assert messages == [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
