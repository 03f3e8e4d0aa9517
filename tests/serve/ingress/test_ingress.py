"""An ingress of this process, with limits of its own, before the engines of the deployment."""

import asyncio
import json
import logging
import time
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from ray import serve as ray_serve
from ray.util import metrics

import serve.ingress.ingress
import serve.ingress.routes
from serve.config import serve_config
from serve.errors import DeadlineError
from serve.ingress.ingress import Ingress
from serve.ingress.routes import http_app
from serve.observe.journeys import Journeys
from serve.observe.tracing import Tracer
from serve.replica.replica import Work
from skipvision.engine import Choice, Chunk, Completion, Request, Timing, Usage
from tests.serve.conftest import LONG, asking

BODY = {"model": "tiny", "messages": asking(), "max_tokens": 400, "response_format": LONG}


@pytest.fixture
def run(endpoint, monkeypatch):
    """Runs a function of the ingress and its client."""

    def run(limits, function, **settings):
        async def running():
            model = {"path": str(endpoint.model), "name": "tiny", **settings}
            config = serve_config({"models": [model], "limits": {"max_new_tokens": 400, **limits}})
            here = Ingress(config, ray_serve.get_deployment_handle("engine-tiny", "skipvision"))
            monkeypatch.setattr(serve.ingress.routes, "_here", lambda: here)
            transport = httpx.ASGITransport(http_app(config))
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as client:
                found = await function(here, client)
            await here.close()
            return found

        return asyncio.run(running())

    return run


def asked(client, **more):
    return client.post("/v1/chat/completions", json={**BODY, **more})


def told(response):
    error = response.json()["error"]
    return response.status_code, error["type"], error["code"]


def test_a_request_whose_time_is_over_before_its_first_token_is_an_error(run):
    async def waits_for_an_image(here, client):
        here._media.fetch = lambda url: asyncio.sleep(60)
        return await asked(client)

    async def waits_for_an_engine(here, client):
        await asked(client, max_tokens=1, response_format=None)  # the way there is known
        here._journeys.seconds = 60
        before = [asyncio.create_task(asked(client, n=4)) for _ in range(3)]  # all of its rows
        await asyncio.sleep(0.3)
        here._journeys.seconds = 0.2
        found = [await asked(client, stream=stream) for stream in (False, True)]
        assert {(await each).status_code for each in before} == {200}
        return found

    begin = time.monotonic()
    responses = [run({"request_seconds": 0.5}, waits_for_an_image)]
    assert time.monotonic() - begin < 10
    responses += run({"request_seconds": 60}, waits_for_an_engine)
    assert [told(response) for response in responses] == [(504, "server_error", "timeout")] * 3


class Hanging:
    """In place of the engines' handle, and of what they write: one token, and nothing more."""

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
    monkeypatch.setattr(serve.ingress.ingress, "GRACE_SECONDS", 0)
    engine = Hanging()

    async def ask(here, client):
        here._engines = [engine]
        return await asked(client, stream=True)

    begin = time.monotonic()
    response = run({"request_seconds": 2}, ask)
    assert time.monotonic() - begin < 30
    _, first, error, end = response.text.removesuffix("\n\n").split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"] == {"content": "a"}
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert (response.status_code, end, engine.cancelled) == (200, "data: [DONE]", True)


@pytest.mark.parametrize("asks", [False, True])
def test_a_skipconfig_that_the_engine_refuses_is_the_field_of_who_gave_it(run, asks):
    skip = {"retained": 4, "skipped": 6, "probe_layer": 99}

    async def ask(here, client):
        more = {"skip": skip} if asks else {}
        found = [await asked(client, stream=stream, **more) for stream in (False, True)]
        body = {"model": "tiny", "messages": asking(), **more}
        return [*found, await client.post("/v1/overlay", json=body)]

    for response in run({}, ask, **({} if asks else {"skip": skip})):
        assert told(response) == (400, "invalid_request_error", "invalid_value")
        error = response.json()["error"]
        assert "probe_layer=99" in error["message"]
        assert error["param"] == ("skip" if asks else None)


def test_what_nobody_foresaw_is_an_error_counted_and_logged_as_one(run, monkeypatch, caplog):
    counted = {}

    async def broken():
        raise LookupError("what no client shall read")

    async def ask(here, client):
        here.models = broken
        return await client.get("/v1/models")

    def count(self, value=1.0, tags=None):
        counted[self.info["name"]] = tags

    monkeypatch.setattr(metrics.Counter, "inc", count)
    with caplog.at_level(logging.INFO, "ray.serve"):
        assert told(response := run({}, ask)) == (500, "server_error", "internal_error")
    assert "client" not in response.text
    assert counted["skipvision_http_requests"] == {"route": "/v1/models", "status": "500"}
    assert counted["skipvision_errors"] == {"kind": "internal_error"}
    (line,) = [record for record in caplog.records if record.message == "answered"]
    assert line.status == 500
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_an_overlay_whose_time_is_over_costs_the_engine_nothing(endpoint):
    engine = ray_serve.get_deployment_handle("engine-tiny", "skipvision")
    late = Work(Request(), time.time() - 1)
    assert isinstance(engine.plan.remote(late).result(timeout_s=60), DeadlineError)


def test_a_request_whose_time_is_over_later_ends_with_what_it_has(run):
    async def ask(here, client):
        for seconds in (4, 2, 1, 0.5, 0.25):  # whatever this machine needs for a whole answer
            here._journeys.seconds = seconds
            response = await asked(client)
            if response.status_code != 200:
                continue
            (choice,), usage = response.json()["choices"], response.json()["usage"]
            if choice["finish_reason"] == "length" and usage["completion_tokens"] < 400:
                return choice["message"]["content"]
        raise AssertionError("no answer was cut off")

    assert run({}, ask)


def test_requests_of_many_megabytes_reach_an_engine(run, monkeypatch):
    """As those do that have many images, in one piece, streamed, or asked about."""
    monkeypatch.setattr(
        serve.ingress.ingress, "Work", lambda *given: Work(*given[:2], traceparent="0" * 6_000_000)
    )

    async def ask(here, client):
        short = {"max_tokens": 2, "response_format": None}
        overlay = client.post("/v1/overlay", json={**BODY, **short})
        return [await asked(client, **short), await asked(client, stream=True, **short), await overlay]

    answer, stream, overlay = run({}, ask)
    assert [each.status_code for each in (answer, stream, overlay)] == [200, 200, 200]
    assert stream.text.endswith("data: [DONE]\n\n")
    assert "error" not in stream.text


def test_an_ingress_takes_so_many_requests_and_answers_what_needs_no_engine(run):
    async def ask(here, client):
        first = asyncio.create_task(asked(client))
        await asyncio.sleep(0.1)
        second, models = await asked(client), await client.get("/v1/models")
        return await first, second, models

    first, second, models = run({"open_requests": 1, "retry_after_s": 7}, ask)
    assert (first.status_code, models.status_code) == (200, 200)
    assert told(second) == (429, "rate_limit_error", "overloaded")
    assert second.headers["retry-after"] == "7"


def test_the_first_token_counts_from_arrival(local_ray):
    """Answered in one piece, and streamed to a client that reads slowly."""
    journeys, seen = Journeys(Tracer(None, "x"), 60), []
    journeys.first_token = SimpleNamespace(observe=lambda value, tags: seen.append(value))
    choice = Choice(0, "ab", (1, 2), "stop")
    done = Completion(Request(), 0, (choice,), Usage(), Timing(queued=0.5, first_token=1.0, total=3.0))
    for streamed in (False, True):
        with journeys.begin("tiny", time.monotonic() - 5, None) as journey:
            if streamed:
                journey.spoke()
                time.sleep(0.2)
            journey.arrived(done)
    assert seen == [pytest.approx(3, abs=0.1), pytest.approx(5, abs=0.1)]
