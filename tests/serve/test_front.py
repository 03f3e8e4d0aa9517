"""Responses to requests whose ingress dies, and to errors of Ray's proxy."""

import asyncio
import json
import threading
import time

import httpx2 as httpx
import openai
import psutil
import pytest
from ray.serve._private.http_util import (
    RequestIdMiddleware,
    convert_object_to_asgi_messages,
    validate_http_proxy_callback_return,
)
from starlette.responses import JSONResponse, PlainTextResponse

from serve import front
from serve.front import Front
from tests.serve.conftest import LONG, eventually, question

CHAT = "/v1/chat/completions"
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def scope_of(path=CHAT, method="POST", headers=(), kind="http"):
    return {"type": kind, "method": method, "path": path, "headers": [*headers], "root_path": ""}


def around(app, tries=2, **options):
    """`Front` around a proxy, which sets the request ids as Ray's does."""
    return Front(RequestIdMiddleware(app), tries, **options)


def ask(app, body=(b"ab", b"cd"), **request):
    """Return the status, headers and body of the response; None if there is none."""
    sent, pieces = [], [*body]

    async def receive():
        if not pieces:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope_of(**request), receive, send))
    if not sent:
        return None
    heads = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], heads, b"".join(each["body"] for each in sent[1:]).decode()


class Dying:
    """A proxy whose first ingresses die after reading some pieces and sending some messages."""

    def __init__(self, deaths, reads=2, sends=()):
        self.deaths, self.reads, self.sends = deaths, reads, sends
        self.scopes = []

    async def __call__(self, scope, receive, send):
        self.scopes.append({**scope, "headers": dict(scope["headers"])})
        scope["root_path"] += "/prefix"  # as Ray's does
        dies = len(self.scopes) <= self.deaths
        read = [(await receive())["body"] for _ in range(self.reads if dies else 2)]
        if not dies:
            await PlainTextResponse(b"".join(read))(scope, receive, send)
        for message in self.sends if dies else ():
            await send(message)

    def heads(self, name):
        return [scope["headers"].get(name) for scope in self.scopes]


@pytest.mark.parametrize("reads", [0, 1, 2])
@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_a_request_is_retried_if_its_ingress_dies_before_responding(deaths, reads):
    app = Dying(deaths, reads)
    status, headers, body = ask(around(app, 3))
    assert (status, body, len(app.scopes)) == (200, "abcd", deaths + 1)
    assert {*app.heads(b"x-request-id")} == {headers["x-request-id"].encode()}
    assert {scope["root_path"] for scope in app.scopes} == {""}
    assert [age is not None for age in app.heads(front.AGE)] == [False] + [True] * deaths


def test_after_the_last_try_the_client_gets_an_error():
    app = Dying(2)
    status, headers, body = ask(around(app))
    assert (status, json.loads(body)["error"]["code"], len(app.scopes)) == (503, "ingress_died", 2)
    assert headers["retry-after"] == "1"
    assert headers["x-request-id"].encode() == app.heads(b"x-request-id")[0]


@pytest.mark.parametrize(
    ("path", "method", "tries"),
    [
        ("/v1/overlay", "POST", 2),
        ("/v1/models", "GET", 2),
        ("/healthz", "HEAD", 2),
        (CHAT, "OPTIONS", 2),
        ("/v1/files", "POST", 1),
        ("/", "POST", 1),
        ("/mine", "GET", 1),
        ("/mine/v1/chat/completions", "POST", 1),
    ],
)
def test_only_requests_without_side_effects_are_retried(path, method, tries):
    app = Dying(9)
    found = ask(around(app), path=path, method=method)
    assert len(app.scopes) == tries
    assert (found is None) == path.startswith("/mine")  # another application's


def test_requests_whose_bodies_exceed_the_budget_are_not_retried():
    app = Dying(1)
    small = around(app, kept_bytes=3)
    assert ask(small)[0] == 503
    assert len(app.scopes) == 1
    app.scopes.clear()
    assert ask(small, body=(b"a", b"bc"))[0] == 200  # the budget is free again


def test_concurrent_bodies_share_the_budget():
    both = []

    async def app(scope, receive, send):
        await receive()
        both.append(scope)
        while len(both) < 2:
            await asyncio.sleep(0)

    async def two():
        async def receive():
            return {"type": "http.request", "body": b"ab", "more_body": False}

        async def send(message):
            pass

        shared = around(app, kept_bytes=3)
        await asyncio.gather(*(shared(scope_of(), receive, send) for _ in range(2)))

    asyncio.run(two())
    assert len(both) == 3  # only one of them is retried


@pytest.mark.parametrize("when", [0, 1, 2])
def test_the_request_of_a_disconnected_client_is_not_retried(when):
    messages = [{"type": "http.request", "body": b"a", "more_body": True}] * when
    calls = []

    async def app(scope, receive, send):
        calls.append([await receive() for _ in range(when + 1)])

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(message)

    asyncio.run(around(app)(scope_of(), receive, send))
    assert [read[-1]["type"] for read in calls] == ["http.disconnect"]


def test_a_proxy_that_shuts_down_does_not_retry():
    calls = []

    async def app(scope, receive, send):
        calls.append(scope)
        try:
            await asyncio.sleep(9)
        except asyncio.CancelledError:  # as Ray's does
            return

    async def send(message):
        pass

    async def cancelled():
        task = asyncio.create_task(around(app)(scope_of(), None, send))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(cancelled())
    assert len(calls) == 1


@pytest.mark.parametrize(("sent", "between"), [(b"data: 1\n\n", ""), (b"data: 1", "\n\n"), (None, "")])
def test_an_interrupted_stream_ends_with_an_error_event(sent, between):
    pieces = [] if sent is None else [{"type": "http.response.body", "body": sent, "more_body": True}]
    app = Dying(1, sends=[START, *pieces])
    status, _, body = ask(around(app))
    begun = (sent or b"").decode() + between
    assert (status, body[: len(begun)], len(app.scopes)) == (200, begun, 1)
    error, end, rest = body[len(begun) :].split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "ingress_died"
    assert (end, rest) == ("data: [DONE]", "")


def test_a_complete_stream_is_left_alone():
    end = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
    assert ask(around(Dying(1, sends=[START, end])))[2] == "data: [DONE]\n\n"


def test_an_interrupted_json_answer_is_not_completed():
    start = {**START, "headers": [(b"content-type", b"application/json")]}
    piece = {"type": "http.response.body", "body": b'{"a"', "more_body": True}
    assert ask(around(Dying(1, sends=[start, piece])))[2] == '{"a"'


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (404, [], (503, "unavailable", "1")),
        (408, [], (504, "timeout", None)),
        (429, [(b"retry-after", b"7")], (429, "overloaded", "7")),
        (503, [(b"retry-after", b"Mon, 23 Nov 2026 20:54:13 GMT")], (503, "unavailable", "1")),
    ],
)
def test_errors_of_rays_proxy_get_openais_format(status, headers, expected):
    app = Dying(1, sends=convert_object_to_asgi_messages("Path not found", status, headers))
    found, heads, body = ask(around(app))
    assert (found, json.loads(body)["error"]["code"], heads.get("retry-after")) == expected
    assert heads["x-request-id"]
    assert len(app.scopes) == 1


@pytest.mark.parametrize(
    "answer", [PlainTextResponse("mine", 404), PlainTextResponse("mine", 503), JSONResponse("mine", 404)]
)
def test_responses_of_applications_are_left_alone(answer):
    assert "mine" in ask(around(answer))[2]
    assert ask(around(Dying(1, sends=convert_object_to_asgi_messages("mine", 400))))[::2] == (400, "mine")


@pytest.mark.parametrize("given", [b"x" * 129, b"a b", b'a"', b"", "é".encode(), b"\xff"])
@pytest.mark.parametrize("path", [CHAT, "/healthz", "/"])
def test_request_ids_that_are_not_safe_to_log_are_replaced(given, path):
    app = Dying(0)
    for each in (given, b"mine-1"):
        ask(around(app), headers=[(b"x-request-id", each)], path=path)
    made, mine = app.heads(b"x-request-id")
    assert (len(made), mine) == (36, b"mine-1")


@pytest.mark.parametrize("name", [*front._CONTROLS, b"serve_multiplexed_model_id"])
def test_clients_cannot_send_headers_that_control_ray(name):
    app = Dying(0)
    ask(around(app), headers=[(name, b"\xff"), (b"accept", b"*/*")])
    assert app.heads(name) == [None]
    assert app.heads(b"accept") == [b"*/*"]


def test_an_exception_in_rays_proxy_gets_openais_format():
    async def app(scope, receive, send):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")

    status, _, body = ask(around(app))
    assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")


def test_websockets_pass_through():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    ask(Front(app, 2), kind="websocket")
    assert seen == ["websocket"]


@pytest.mark.parametrize(("haproxy", "tries"), [("0", 2), ("1", 1)])
def test_ray_accepts_the_middleware(monkeypatch, haproxy, tries):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", haproxy)
    (one,) = validate_http_proxy_callback_return(front.middlewares())
    assert (one.cls, one.kwargs) == (Front, {"tries": tries})


def ingresses():
    everything = psutil.Process().children(recursive=True)
    return [each for each in everything if ":skipvision:ingress" in "".join(each.cmdline()[:1])]


@pytest.mark.slow
def test_an_ingress_that_is_killed_loses_no_request(endpoint):
    """The next ingress gives a whole answer; a stream that has begun ends with an error event."""
    answers = []
    options = {"model": "tiny", "messages": question(), "max_tokens": 400, "response_format": LONG}

    def whole():
        with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="x", max_retries=0) as client:
            answers.append(client.chat.completions.create(**options).choices[0].finish_reason)

    with httpx.stream("POST", f"{endpoint.url}{CHAT}", json={**options, "stream": True}, timeout=60) as begun:
        lines = filter(None, begun.iter_lines())
        next(lines)
        waiting = threading.Thread(target=whole)
        waiting.start()
        time.sleep(0.3)
        (ingress,) = ingresses()
        ingress.kill()
        *_, error, end = lines
    assert (json.loads(error.removeprefix("data: "))["error"]["code"], end) == (
        "ingress_died",
        "data: [DONE]",
    )
    waiting.join(60)
    assert len(answers) == 1
    assert answers[0] in ("stop", "length")
    counted = "ray_skipvision_front_retries_total"
    eventually(lambda: counted in httpx.get(f"{endpoint.url}/metrics", timeout=20).text)
    assert 'kind="ingress_died"' in httpx.get(f"{endpoint.url}/metrics", timeout=20).text
