"""What clients see when an ingress dies over their requests, and of errors of Ray's proxy."""

import asyncio
import json
import threading
import time

import httpx2 as httpx
import openai
import psutil
import pytest
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from serve import front
from serve.front import Front
from tests.serve.conftest import LONG, asking, eventually

CHAT = "/v1/chat/completions"
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def ask(app, path=CHAT, method="POST", body=(b"ab", b"cd"), headers=()):
    """The status, headers and body that a client gets of an application that `Front` is around."""
    said, pieces = [], [*body]

    async def receive():
        if not pieces:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [*headers]}
    asyncio.run(Front(app)(scope, receive, send))
    if not said:
        return None
    heads = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return said[0]["status"], heads, b"".join(each["body"] for each in said[1:]).decode()


class Dying:
    """An application whose first replicas die when they have read so many pieces, and sent so many."""

    def __init__(self, deaths, reads=2, sends=()):
        self.deaths, self.reads, self.sends = deaths, reads, sends
        self.seen = []

    async def __call__(self, scope, receive, send):
        heads = scope["headers"] = [*scope["headers"]]
        if b"x-request-id" not in dict(heads):
            heads.append((b"x-request-id", b"made"))
        self.seen.append((dict(heads)[b"x-request-id"], []))
        dies = len(self.seen) <= self.deaths
        for _ in range(self.reads if dies else 2):
            self.seen[-1][1].append((await receive())["body"])
        if not dies:
            await PlainTextResponse(b"".join(self.seen[-1][1]))(scope, receive, send)
            return
        for message in self.sends:
            await send(message)


@pytest.mark.parametrize("reads", [0, 1, 2])
@pytest.mark.parametrize("deaths", [0, 1, front.TRIES - 1])
def test_an_ingress_that_says_nothing_gives_its_request_to_the_next(deaths, reads):
    app = Dying(deaths, reads)
    status, _, body = ask(app)
    assert (status, body, len(app.seen)) == (200, "abcd", deaths + 1)
    assert {number for number, _ in app.seen} == {b"made"}


def test_in_the_end_the_client_is_told():
    app = Dying(front.TRIES)
    status, headers, body = ask(app)
    assert (status, json.loads(body)["error"]["code"], len(app.seen)) == (503, "ingress_died", front.TRIES)
    assert (headers["x-request-id"], headers["retry-after"]) == ("made", "1")


@pytest.mark.parametrize(
    ("path", "method", "tries"),
    [
        ("/other/v1/overlay", "POST", front.TRIES),
        ("/v1/models", "GET", front.TRIES),
        ("/v1/files", "POST", 1),
        ("/mine", "POST", 1),
    ],
)
def test_only_what_may_be_done_twice_is(path, method, tries):
    app = Dying(9)
    found = ask(app, path, method)
    assert len(app.seen) == tries
    assert (found is None) == (path == "/mine")  # another application's


def test_a_body_beyond_what_is_kept_goes_to_one_ingress_only(monkeypatch):
    monkeypatch.setattr(front, "KEPT_BYTES", 3)
    app = Dying(1)
    assert ask(app)[0] == 503
    assert front._Body._kept == 0
    assert ask(Dying(1), body=(b"a", b"b"))[0] == 200
    assert front._Body._kept == 0


def test_a_client_that_has_gone_is_not_asked_for_again():
    calls = []

    async def app(scope, receive, send):
        calls.append((await receive())["type"])

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(Front(app)(scope, gone, send))
    assert calls == ["http.disconnect"]


@pytest.mark.parametrize(("sent", "between"), [(b"data: 1\n\n", ""), (b"data: 1", "\n\n"), (None, "")])
def test_a_stream_that_breaks_off_ends_with_an_error_event(sent, between):
    pieces = [] if sent is None else [{"type": "http.response.body", "body": sent, "more_body": True}]
    app = Dying(1, sends=[START, *pieces])
    status, _, body = ask(app)
    begun = (sent or b"").decode() + between
    assert (status, body[: len(begun)], len(app.seen)) == (200, begun, 1)
    error, end, rest = body[len(begun) :].split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "ingress_died"
    assert (end, rest) == ("data: [DONE]", "")


def test_a_stream_that_has_ended_is_left_alone():
    end = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
    assert ask(Dying(1, sends=[START, end]))[2] == "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (404, {}, (404, "not_found", None)),
        (408, {}, (504, "timeout", None)),
        (429, {"retry-after": "7"}, (429, "overloaded", "7")),
        (503, {}, (503, "unavailable", "1")),
    ],
)
def test_errors_of_rays_proxy_are_said_as_openais(status, headers, said):
    fields = {"content-type": "text/plain; charset=utf-8", **headers}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    start = {"type": "http.response.start", "status": status, "headers": raw}
    app = Dying(1, sends=[start, {"type": "http.response.body", "body": b"Path not found"}])
    found, heads, body = ask(app)
    assert (found, json.loads(body)["error"]["code"], heads.get("retry-after")) == said
    assert len(app.seen) == 1


def test_texts_of_applications_are_their_own():
    async def app(scope, receive, send):
        await PlainTextResponse("mine", 404)(scope, receive, send)

    assert ask(app)[::2] == (404, "mine")


@pytest.mark.parametrize("given", [b"x" * 129, b"a b", b'a"', b"", "é".encode()])
def test_request_ids_that_would_spoil_a_log_are_replaced(given):
    app = Dying(0)
    ask(app, headers=[(b"x-request-id", given)])
    assert app.seen[0][0] == b"made"
    ask(app, headers=[(b"x-request-id", b"mine-1")])
    assert app.seen[1][0] == b"mine-1"


def test_ray_takes_it():
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    (one,) = validate_http_proxy_callback_return(front.middlewares())
    assert isinstance(one, Middleware)


def ingresses():
    everything = psutil.Process().children(recursive=True)
    return [each for each in everything if ":skipvision:ingress" in "".join(each.cmdline()[:1])]


def test_an_ingress_that_is_killed_loses_no_request(endpoint):
    """An answer in one piece is the next ingress's; a stream that had begun ends with an event."""
    answers, events = [], []
    options = {"model": "tiny", "messages": asking(), "max_tokens": 400, "response_format": LONG}

    def whole():
        with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="x", max_retries=0) as client:
            answers.append(client.chat.completions.create(**options).choices[0].finish_reason)

    with httpx.stream("POST", f"{endpoint.url}{CHAT}", json={**options, "stream": True}, timeout=60) as begun:
        lines = filter(None, begun.iter_lines())
        events.append(next(lines))
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
