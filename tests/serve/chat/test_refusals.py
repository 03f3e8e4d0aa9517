"""Bad requests are refused as OpenAI refuses them: by field, with a code and a message."""

import base64
import functools
import io
import re

import httpx2 as httpx
import openai
import pytest
from PIL import Image

from tests.serve.conftest import question


@pytest.fixture(scope="module")
def client(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def content(*parts):
    return [{"role": "user", "content": list(parts)}]


def following(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def image_part(data):
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def png(size):
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "png")
    return buffer.getvalue()


IMAGE = "messages.0.content.0.image_url.url"
SCHEMA = "response_format.json_schema"
NESTED = functools.reduce(lambda inner, _: {"items": inner}, range(500), {"type": "integer"})
WIDE = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(3000)}}
TOO_COMPLEX = ("response_format", "this JSON schema cannot be followed: it is too complex")
LARGE = image_part(png((4990, 5000)))
CUT_OFF = image_part(png((64, 48))[:50])


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"max_completion_tokens": 401}, "max_completion_tokens", "at most 400 here"),
        (
            {"max_completion_tokens": None, "max_tokens": 401},
            "max_tokens",
            "max_tokens=401: at most 400 here",
        ),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": question("x", 1, 2, 3, 4)}, "messages", "4 images; at most 3"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "system"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "not supported"),
        ({"presence_penalty": 1}, "presence_penalty", "not supported"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream=true"),
        ({"extra_body": {"best_of": 3}}, "best_of", "Unknown parameter: 'best_of'."),
        (
            {"messages": [{"role": "user", "content": "x", "mood": "y"}]},
            "messages.0.mood",
            "Unknown parameter",
        ),
        ({"n": 5}, "n", "n=5: n must be at most 4"),
        ({"extra_body": {"skip": {"skipped": 0, "summary_tokens": 3}}}, "skip", "summary_tokens=3, but th"),
        (
            {"messages": question("x" * 10**5)},
            "messages",
            "maximum context length is 512 tokens. However,",
        ),
        ({"extra_body": {"skip": {"retained": -1}}}, "skip.retained", "skip.retained: Input should be"),
        ({"extra_body": {"skip": "none"}}, "skip", "skip: Input should be 'full'"),
        ({"messages": content({"type": "image_url", "image_url": {"url": 5}})}, IMAGE, f"{IMAGE}: Input"),
        (
            {"messages": question("x" * 600)},
            "messages",
            "of this model's positions, too few for an answer of",
        ),
        ({"response_format": following(NESTED)}, f"{SCHEMA}.schema", "at most 64 levels are allowed"),
        ({"response_format": following(WIDE)}, f"{SCHEMA}.schema", "at most 65,536 are allowed"),
        ({"response_format": following({"type": "foo"})}, "response_format", "followed: Invalid type: foo"),
        ({"response_format": following({"multipleOf": 829318151, "type": "integer"})}, *TOO_COMPLEX),
        ({"extra_body": {"model": NESTED}}, "model", "valid string"),
        ({"messages": content(*[LARGE] * 3)}, "messages", "images of 74,850,000 pixels; at most 50,000,000"),
        ({"messages": content(LARGE, CUT_OFF)}, "messages.0.content.1.image_url.url", "cannot be decoded"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_bad_requests_are_refused_with_their_field(client, change, param, message):
    options = {"model": "red", "messages": question(), "max_completion_tokens": 5, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options)
    error = caught.value
    assert message in error.message
    assert len(error.message) < 500
    assert "Value error" not in error.message
    assert error.message.count(" (got ") <= 1, "one mistake, one message"
    assert error.type == "invalid_request_error"
    assert error.param == param


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"n": 5}, "invalid_value"),
        ({"messages": question("x" * 600)}, "context_length_exceeded"),
        ({"messages": content(CUT_OFF)}, "media_format"),
        ({"response_format": following({"type": "foo"})}, "invalid_json_schema"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_errors_have_codes(client, change, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "red", "messages": question(), **change})
    assert caught.value.code == code


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,AAAA",
        "data:text/html;base64,AAAA",
        "http://127.0.0.1:1/x.png",
        "http://localhost/x.png",
        "file:///etc/passwd",
        "nonsense",
    ],
)
def test_bad_images_are_refused(client, url):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="red", messages=[{"role": "user", "content": content}])
    assert caught.value.code.startswith("media_")


def test_unknown_models_and_routes_are_refused(client, endpoint):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="green", messages=question())
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    for method, path, status, code in (
        ("GET", "/v2", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
    ):
        response = httpx.request(method, endpoint.url + path)
        assert response.status_code == status
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", code)


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"{not json", "application/json", "the body is not JSON: .* at character 1"),
        (b"", "application/json", "the body is empty: send JSON"),
        (b"{}", "text/plain", "send Content-Type: application/json"),
        (b"[]", "application/json", "the body: Input should be a valid dictionary"),
        (b'{"model": "\xff"}', "application/json", "error parsing the body"),
    ],
)
def test_bodies_that_are_not_json_are_refused(endpoint, body, kind, message):
    url, headers = f"{endpoint.url}/v1/chat/completions", {"content-type": kind}
    response = httpx.post(url, content=body, headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_value")
    assert re.search(message, error["message"])
