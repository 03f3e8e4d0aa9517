"""An ingress of this process, with limits of its own, before the engines of the deployment."""

import asyncio
import time
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from ray import serve as ray_serve

import serve.api
import serve.routes
from serve.api import Ingress
from serve.config import serve_config
from serve.errors import DeadlineError
from serve.journeys import Journeys
from serve.replica import Work
from serve.routes import http_app
from serve.tracing import Tracer
from skipvision.engine import Choice, Completion, Request, Timing, Usage
from tests.serve.conftest import LONG, asking

BODY = {"model": "tiny", "messages": asking(), "max_tokens": 400, "response_format": LONG}


@pytest.fixture
def run(endpoint, monkeypatch):
    """Runs a function of the ingress and its client."""

    def run(limits, function):
        async def running():
            model = {"path": str(endpoint.model), "name": "tiny"}
            config = serve_config({"models": [model], "limits": {"max_new_tokens": 400, **limits}})
            here = Ingress(config, ray_serve.get_deployment_handle("engine-tiny", "skipvision"))
            monkeypatch.setattr(serve.routes, "_here", lambda: here)
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
    monkeypatch.setattr(serve.api, "Work", lambda *given: Work(*given[:2], traceparent="0" * 6_000_000))

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
