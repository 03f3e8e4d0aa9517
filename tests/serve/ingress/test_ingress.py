"""An ingress in this process, with its own limits, in front of the deployment's engines."""

import asyncio
import json
import logging
import time
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from ray import serve as ray_serve
from ray.util import metrics

import serve.ingress.dispatch
import serve.ingress.ingress
import serve.ingress.preparation
import serve.ingress.routes
from serve.config import serve_config
from serve.errors import DeadlineError
from serve.ingress.ingress import Ingress
from serve.ingress.routes import http_app
from serve.observe.journeys import Journeys
from serve.observe.tracing import Tracer
from serve.replica.messages import Work
from skipvision.engine import Choice, Chunk, Completion, Request, Timing, Usage
from tests.serve.conftest import LONG, question

BODY = {"model": "tiny", "messages": question(), "max_tokens": 400, "response_format": LONG}


@pytest.fixture
def run(endpoint, monkeypatch):
    """Runs a function with an ingress and a client of it."""

    def run(limits, function, engines=None, **settings):
        async def running():
            model = {"path": str(endpoint.model), "name": "tiny", **settings}
            config = serve_config({"models": [model], "limits": {"max_new_tokens": 400, **limits}})
            handle = engines or ray_serve.get_deployment_handle("engine-tiny", "skipvision")
            ingress = Ingress(config, handle)
            monkeypatch.setattr(serve.ingress.routes, "_this_ingress", lambda: ingress)
            transport = httpx.ASGITransport(http_app(config))
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
                result = await function(ingress, client)
            await ingress.close()
            return result

        return asyncio.run(running())

    return run


def post(client, **changes):
    return client.post("/v1/chat/completions", json={**BODY, **changes})


def error_of(response):
    error = response.json()["error"]
    return response.status_code, error["type"], error["code"]


def test_a_deadline_before_the_first_token_is_an_error(run):
    async def wait_for_an_image(ingress, client):
        ingress.preparer._media.fetch = lambda url: asyncio.sleep(60)
        return await post(client)

    async def wait_for_an_engine(ingress, client):
        await post(client, max_tokens=1, response_format=None)  # resolves the route to the engine
        ingress.journeys.seconds = 60
        earlier = [asyncio.create_task(post(client, n=4)) for _ in range(3)]  # each fills all rows
        await asyncio.sleep(0.3)
        ingress.journeys.seconds = 0.2
        late = [await post(client, stream=stream) for stream in (False, True)]
        assert {(await each).status_code for each in earlier} == {200}
        return late

    begin = time.monotonic()
    responses = [run({"request_seconds": 0.5}, wait_for_an_image)]
    assert time.monotonic() - begin < 10
    responses += run({"request_seconds": 60}, wait_for_an_engine)
    assert [error_of(response) for response in responses] == [(504, "server_error", "timeout")] * 3


class HangingEngine:
    """In place of a deployment handle and of its stream: one token, then nothing."""

    def __init__(self):
        self.stream, self.begun, self.cancelled = SimpleNamespace(remote=lambda work: self), False, False

    def options(self, **_):
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.begun:
            await asyncio.sleep(60)
        self.begun = True
        return Chunk(0, 0, "a", (1,))

    def cancel(self):
        self.cancelled = True


def test_a_stream_whose_engine_hangs_ends_with_an_error(run, monkeypatch):
    monkeypatch.setattr(serve.ingress.dispatch, "GRACE_SECONDS", 0)
    engine = HangingEngine()

    async def stream(ingress, client):
        return await post(client, stream=True)

    begin = time.monotonic()
    response = run({"request_seconds": 2}, stream, engines=engine)
    assert time.monotonic() - begin < 30
    _, first, error, end = response.text.removesuffix("\n\n").split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"] == {"content": "a"}
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert (response.status_code, end, engine.cancelled) == (200, "data: [DONE]", True)


@pytest.mark.parametrize("in_request", [False, True])
def test_a_refused_skipconfig_names_the_field_skip_only_if_the_request_set_it(run, in_request):
    skip = {"retained": 4, "skipped": 6, "probe_layer": 99}

    async def post_all(ingress, client):
        more = {"skip": skip} if in_request else {}
        answers = [await post(client, stream=stream, **more) for stream in (False, True)]
        body = {"model": "tiny", "messages": question(), **more}
        return [*answers, await client.post("/v1/overlay", json=body)]

    for response in run({}, post_all, **({} if in_request else {"skip": skip})):
        assert error_of(response) == (400, "invalid_request_error", "invalid_value")
        error = response.json()["error"]
        assert "probe_layer=99" in error["message"]
        assert error["param"] == ("skip" if in_request else None)


def test_an_unexpected_error_is_hidden_from_the_client_and_counted_and_logged_once(run, monkeypatch, caplog):
    counted = {}

    async def broken():
        raise LookupError("what no client may read")

    async def get(ingress, client):
        ingress.models = broken
        return await client.get("/v1/models")

    def count(self, value=1.0, tags=None):
        counted[self.info["name"]] = tags

    monkeypatch.setattr(metrics.Counter, "inc", count)
    with caplog.at_level(logging.INFO, "ray.serve"):
        assert error_of(response := run({}, get)) == (500, "server_error", "internal_error")
    assert "client" not in response.text
    assert counted["skipvision_http_requests"] == {"route": "/v1/models", "status": "500"}
    assert counted["skipvision_errors"] == {"kind": "internal_error"}
    (line,) = [record for record in caplog.records if record.message == "answered"]
    assert line.status == 500
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_an_overlay_past_its_deadline_does_not_reach_the_engine(endpoint):
    engine = ray_serve.get_deployment_handle("engine-tiny", "skipvision")
    late = Work(Request(), time.time() - 1)
    assert isinstance(engine.plan.remote(late).result(timeout_s=60), DeadlineError)


def test_a_deadline_after_the_first_token_ends_the_answer_early(run):
    async def find_a_partial_answer(ingress, client):
        for seconds in (4, 2, 1, 0.5, 0.25):  # one of them cuts an answer off on any machine
            ingress.journeys.seconds = seconds
            response = await post(client)
            if response.status_code != 200:
                continue
            (choice,), usage = response.json()["choices"], response.json()["usage"]
            if choice["finish_reason"] == "length" and usage["completion_tokens"] < 400:
                return choice["message"]["content"]
        raise AssertionError("no answer was cut off")

    assert run({}, find_a_partial_answer)


def test_requests_of_many_megabytes_reach_an_engine(run, monkeypatch):
    """Requests with many images are as large: answered in one piece, streamed, and as an overlay."""

    def large_work(*arguments):
        return Work(*arguments[:2], traceparent="0" * 6_000_000)

    monkeypatch.setattr(serve.ingress.preparation, "Work", large_work)
    monkeypatch.setattr(serve.ingress.ingress, "Work", large_work)

    async def post_all(ingress, client):
        short = {"max_tokens": 2, "response_format": None}
        overlay = client.post("/v1/overlay", json={**BODY, **short})
        return [await post(client, **short), await post(client, stream=True, **short), await overlay]

    answer, stream, overlay = run({}, post_all)
    assert [each.status_code for each in (answer, stream, overlay)] == [200, 200, 200]
    assert stream.text.endswith("data: [DONE]\n\n")
    assert "error" not in stream.text


def test_open_requests_are_limited_except_those_that_need_no_engine(run):
    async def post_two(ingress, client):
        first = asyncio.create_task(post(client))
        await asyncio.sleep(0.1)
        second, models = await post(client), await client.get("/v1/models")
        return await first, second, models

    first, second, models = run({"open_requests": 1, "retry_after_s": 7}, post_two)
    assert (first.status_code, models.status_code) == (200, 200)
    assert error_of(second) == (429, "rate_limit_error", "overloaded")
    assert second.headers["retry-after"] == "7"


def test_the_first_token_is_timed_from_the_arrival_of_the_request(local_ray):
    """For an answer in one piece, and for a stream whose client reads slowly."""
    journeys, seen = Journeys(Tracer(None, "x"), 60), []
    journeys.first_token = SimpleNamespace(observe=lambda value, tags: seen.append(value))
    choice = Choice(0, "ab", (1, 2), "stop")
    done = Completion(Request(), 0, (choice,), Usage(), Timing(queued=0.5, first_token=1.0, total=3.0))
    for streamed in (False, True):
        with journeys.begin("tiny", time.monotonic() - 5, None) as journey:
            if streamed:
                journey.mark_first_token()
                time.sleep(0.2)
            journey.finish(done)
    assert seen == [pytest.approx(3, abs=0.1), pytest.approx(5, abs=0.1)]
