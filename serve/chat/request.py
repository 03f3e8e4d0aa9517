"""Translate the body of a chat completion to the engine's terms."""

from __future__ import annotations

import contextlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from PIL import Image

from serve.chat.schemas import ChatRequest, ImagePart, Message, RefusalPart, TextPart
from serve.chat.vocabulary import Vocabulary
from serve.errors import MediaError
from serve.media.images import EncodedImage
from serve.problem import Problem
from skipvision.engine import Request as EngineRequest
from skipvision.engine import Sampling, prepare
from skipvision.errors import InputError

_ANY_OBJECT = '{"type": "object"}'
"""JSON schema of the response format ``json_object``."""

_UNSUPPORTED = (
    *("frequency_penalty", "presence_penalty", "logit_bias"),
    *("tools", "functions", "audio", "moderation", "web_search_options"),
)
"""Fields that are refused because ignoring them would change the answer."""


def conversation(body: ChatRequest, vocabulary: Vocabulary) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return messages for the processor's template, and the URLs of their images, in order, by field."""
    messages: list[dict[str, Any]] = []
    urls: dict[str, str] = {}
    for turn, message in enumerate(body.messages):
        content: list[dict[str, Any]] = []
        for index, part in enumerate(_parts(message)):
            if isinstance(part, ImagePart):
                urls[f"messages.{turn}.content.{index}.image_url.url"] = part.image_url.url
                content.append({"type": "image"})
            else:
                content.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": _escaped(content, vocabulary)})
    return messages, urls


def _escaped(content: Iterable[dict[str, Any]], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Join adjacent texts, and escape special tokens in them."""
    parts: list[dict[str, Any]] = []
    for kind, run in groupby(content, itemgetter("type")):
        if kind == "text":
            parts.append({"type": "text", "text": "".join(part["text"] for part in run)})
        else:
            parts += run
    texts = [part for part in parts if part["type"] == "text"]
    for part, text in zip(texts, vocabulary.escape([part["text"] for part in texts]), strict=True):
        part["text"] = text
    return parts


def _parts(message: Message) -> list[TextPart | ImagePart]:
    """Return the parts of a turn. The words of a refusal are text, as any others of the assistant."""
    content = message.content
    given = content if isinstance(content, list) else [TextPart(type="text", text=content or "")]
    if message.refusal:
        given = [*given, RefusalPart(type="refusal", refusal=message.refusal)]
    return [
        TextPart(type="text", text=part.refusal) if isinstance(part, RefusalPart) else part for part in given
    ]


def refuse_too_long(body: ChatRequest, vocabulary: Vocabulary, positions: int) -> None:
    """Raise `Problem` for texts that are longer than the model's positions however they are tokenized."""
    parts = [part for message in body.messages for part in _parts(message)]
    characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    if characters > positions * vocabulary.longest:
        # OpenAI's words: clients match them.
        message = (
            f"This model's maximum context length is {positions} tokens. However, your messages have "
            f"{characters} characters, which no {positions} tokens hold. Please reduce the length of the "
            "messages."
        )
        raise Problem(400, message, param="messages", code="context_length_exceeded")


def refuse_too_long_text(text: str, vocabulary: Vocabulary, positions: int) -> None:
    """Raise `Problem` if the chat template's text is too long for the model however it is tokenized."""
    if len(text) > positions * vocabulary.longest:
        message = (
            f"This model's maximum context length is {positions} tokens. However, its chat template makes "
            f"{len(text)} characters of your messages. Please reduce the length of the messages."
        )
        raise Problem(400, message, param="messages", code="context_length_exceeded")


def prepared(
    processor: Any, request: EngineRequest, images: Mapping[str, EncodedImage], text: str | None
) -> EngineRequest:
    """Decode a request's images and tokenize the text of its messages."""
    return prepare(processor, replace(request, images=_decoded(images)), text)


def rendered(request: EngineRequest, images: Mapping[str, EncodedImage], text: str | None) -> EngineRequest:
    """Decode a request's images, and replace its messages by their text, for an engine with a processor.

    Raises:
        Problem: an image cannot be decoded.
        InputError: the model has no chat template.
    """
    if text is None:
        raise InputError("this model has no chat template: it cannot answer messages")
    return replace(request, images=_decoded(images), prompt=text)


def _decoded(images: Mapping[str, EncodedImage]) -> list[Image.Image]:
    decoded = []
    for param, image in images.items():
        with blamed_on(param):
            decoded.append(image.open())
    return decoded


@contextlib.contextmanager
def blamed_on(param: str) -> Iterator[None]:
    """Raise an image's `MediaError` as a problem of the field that names the image."""
    try:
        yield
    except MediaError as error:
        raise Problem(400, str(error), param=param, code=error.code) from error


def refuse_unsupported(body: ChatRequest) -> None:
    """Raise `Problem` for fields that are not supported, or that need another field."""
    for name in _UNSUPPORTED:
        value = getattr(body, name)
        if value:
            raise Problem(
                400,
                f"{name}={reprlib.repr(value)} is not supported: leave it out",
                param=name,
                code="unsupported",
            )
    if body.stream_options is not None and not body.stream:
        message = "stream_options without stream=true: leave it out"
        raise Problem(400, message, param="stream_options", code="invalid_value")
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs without logprobs=true: set it, too"
        raise Problem(400, message, param="top_logprobs", code="invalid_value")


def schema(body: ChatRequest) -> str | None:
    """Return the JSON schema that the answer must follow, as JSON; None = free text."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return _ANY_OBJECT
    if wanted.json_schema is None:
        message = "response_format of type json_schema without json_schema: send the schema"
        raise Problem(400, message, param="response_format", code="invalid_value")
    return json.dumps(wanted.json_schema.schema_ or {})


def wanted_tokens(body: ChatRequest) -> int | None:
    """Return the max tokens of an answer that a request names; None = it names none."""
    return body.max_completion_tokens or body.max_tokens


def sampling(body: ChatRequest, max_new_tokens: int, room: int) -> Sampling:
    """Return the sampling settings of a request.

    Args:
        body: the request.
        max_new_tokens: the deployment's limit (tokens).
        room: positions that the prompt leaves for the answer (tokens).

    Raises:
        Problem: the answer is longer than the limit, or does not fit.
    """
    wanted = wanted_tokens(body)
    if wanted is not None and wanted > max_new_tokens:
        name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        message = f"{name}={wanted}: at most {max_new_tokens} here"
        raise Problem(400, message, param=name, code="invalid_value")
    if (wanted or 1) > room:
        message = (
            f"the messages leave {max(room, 0)} of this model's positions, too few for an answer of "
            f"{wanted or 1} tokens: shorten them"
        )
        raise Problem(400, message, param="messages", code="context_length_exceeded")
    return Sampling(
        max_new_tokens=wanted if wanted is not None else min(max_new_tokens, room),
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
        seed=None if body.seed is None else body.seed % 2**63,
        stop=() if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        n=body.n or 1,
    )
