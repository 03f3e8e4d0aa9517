"""Engines that start, stop and die under load. Takes minutes, on separate applications."""

import asyncio
import json
import shutil
import threading
import time

import httpx2 as httpx
import openai
import psutil
import pytest
import torch
from ray import serve as ray_serve

import serve.app
from serve.app import build
from serve.config import serve_config
from serve.deploy import drain
from serve.ingress.dispatch import GRACE_SECONDS
from serve.replica.replica import EngineReplica
from skipvision.engine.running import Running
from tests.serve.conftest import LONG, eventually, question, register

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # `ray.serve.status` warns of a setting for which Ray 2.60 has no replacement; see serve/app.py.
    pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning"),
]
APPLICATION = "faulty"


def deploy(endpoint, seconds=120, **scaling):
    model = {
        "path": str(endpoint.model),
        "name": "tiny",
        "dtype": "float32",
        "engine": {"max_sequences": scaling.pop("max_sequences", 4), "kv_budget_bytes": 2**23},
        "scaling": {"cpus_per_engine": 0.25, "interval_s": 0.5, **scaling},
    }
    settings = {"name": APPLICATION, "models": [model], "limits": {"request_seconds": seconds}}
    ray_serve.run(build(settings), name=APPLICATION, route_prefix="/faulty")


def engines():
    deployments = ray_serve.status().applications[APPLICATION].deployments
    return deployments["engine-tiny"].replica_states.get("RUNNING", 0)


def wait_for_engines(number, seconds=120):
    deadline = time.monotonic() + seconds
    while engines() != number:
        assert time.monotonic() < deadline, engines()
        time.sleep(0.5)


@pytest.fixture
def url(endpoint):
    deploy(endpoint, min_engines=2, max_engines=2)
    yield f"{endpoint.url}/faulty/v1"
    ray_serve.delete(APPLICATION)


def under_load(url, event):
    """Send requests from six clients until 5 s after an event. Return the outcome of each request."""
    outcomes, over = [], asyncio.Event()

    async def client(client, stream):
        while not over.is_set():
            options = {"model": "tiny", "messages": question(), "max_tokens": 40, "temperature": 0}
            try:
                found = await client.chat.completions.create(stream=stream, **options)
                if stream:
                    chunks = [chunk async for chunk in found]
                    assert chunks[-1].choices[0].finish_reason
                outcomes.append("answered")
            except openai.APIError as error:
                outcomes.append((stream, error.code))

    async def everything():
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0, timeout=120) as one:
            clients = [asyncio.create_task(client(one, number % 2 == 1)) for number in range(6)]
            await asyncio.sleep(2)
            await asyncio.to_thread(event)
            await asyncio.sleep(5)
            over.set()
            await asyncio.gather(*clients)

    asyncio.run(everything())
    return outcomes


def test_redeploying_and_scaling_down_fail_no_request(endpoint, url):
    def change():
        deploy(endpoint, min_engines=2, max_engines=2, max_sequences=3)
        deploy(endpoint, min_engines=1, max_engines=1, max_sequences=3)
        wait_for_engines(1)

    outcomes = under_load(url, change)
    assert len(outcomes) > 20
    assert set(outcomes) == {"answered"}


def engine_processes():
    everything = psutil.Process().children(recursive=True)
    return [each for each in everything if f":{APPLICATION}:engine-tiny" in "".join(each.cmdline()[:1])]


def failing(flag):
    """An engine class: the first to decode while the flag exists deletes it, and its device fails."""

    class Failing(EngineReplica):
        async def __init__(self, *given):
            decode = Running.decode

            def fails(running, sequences):
                try:
                    flag.unlink()
                except FileNotFoundError:
                    return decode(running, sequences)
                raise torch.AcceleratorError("the device failed")

            Running.decode = fails
            await super().__init__(*given)

    return Failing


def retries(url):
    """The lines of the endpoint's metrics that count requests sent to another engine."""
    lines = httpx.get(f"{url}/metrics", timeout=20).text.splitlines()
    return {line for line in lines if line.startswith("ray_skipvision_retries_total{")}


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_an_engine_that_dies_interrupts_only_streams_that_have_begun(endpoint, monkeypatch, tmp_path, how):
    flag = tmp_path / "flag"
    monkeypatch.setattr(serve.app, "EngineReplica", failing(flag))
    deploy(endpoint, min_engines=2, max_engines=2)
    url = f"{endpoint.url}/faulty/v1"
    before = retries(endpoint.url)
    outcomes = under_load(url, engine_processes()[0].kill if how == "killed" else flag.touch)
    assert not flag.exists()
    assert outcomes.count("answered") > 10
    broken = [outcome for outcome in outcomes if outcome != "answered"]
    assert broken == [(True, "engine_died")] * len(broken)
    assert len(broken) <= 3
    eventually(lambda: retries(endpoint.url) - before)
    wait_for_engines(2)
    ray_serve.delete(APPLICATION)


def test_an_engine_that_hangs_is_reported_as_down(endpoint):
    deploy(endpoint, seconds=2)
    health, chat = f"{endpoint.url}/faulty/healthz", f"{endpoint.url}/faulty/v1/chat/completions"
    body = {"model": "tiny", "messages": question(), "max_tokens": 2}
    assert httpx.get(health).json()["models"]["tiny"]["status"] == "ok"
    before = httpx.get(f"{endpoint.url}/faulty/v1/models/tiny").json()
    assert httpx.post(chat, json=body, timeout=20).status_code == 200
    (engine,) = engine_processes()
    long = {**body, "stream": True, "max_tokens": 400, "response_format": LONG}
    try:
        with httpx.stream("POST", chat, json=long, timeout=20) as begun:
            events = filter(None, begun.iter_lines())
            next(events)
            engine.suspend()
            *_, error, end = events
        hanging = httpx.get(health, timeout=20)
        card = httpx.get(f"{endpoint.url}/faulty/v1/models/tiny", timeout=20)
        answers = [httpx.post(chat, json={**body, "stream": each}, timeout=20) for each in (False, True)]
    finally:
        engine.resume()
    assert (hanging.status_code, hanging.json()["models"]["tiny"]["status"]) == (503, "down")
    assert card.json() == before
    assert (json.loads(error.removeprefix("data: "))["error"]["code"], end) == ("timeout", "data: [DONE]")
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert answer.elapsed.total_seconds() < 2 + GRACE_SECONDS + 1
    assert httpx.get(health, timeout=20).status_code == 200
    ray_serve.delete(APPLICATION)


def hanging(flag):
    """An engine class whose steps do not end while the flag exists."""

    class Hanging(EngineReplica):
        async def __init__(self, *given):
            decode = Running.decode

            def waits(running, sequences):
                while flag.exists():
                    time.sleep(0.1)
                return decode(running, sequences)

            Running.decode = waits
            await super().__init__(*given)

    return Hanging


def test_an_engine_with_a_long_step_is_reported_as_slow_and_not_as_saturated(endpoint, monkeypatch, tmp_path):
    flag, seen = tmp_path / "flag", []
    monkeypatch.setattr(serve.app, "EngineReplica", hanging(flag))
    deploy(endpoint, seconds=2)
    chat = f"{endpoint.url}/faulty/v1/chat/completions"
    body = {"model": "tiny", "messages": question(), "max_tokens": 2}

    def state():
        found = httpx.get(f"{endpoint.url}/faulty/healthz", timeout=20)
        assert found.status_code == 200
        seen.append(found.json()["models"]["tiny"])
        return seen[-1]["status"]

    assert httpx.post(chat, json=body, timeout=20).status_code == 200
    flag.touch()
    assert httpx.post(chat, json=body, timeout=20).status_code == 504
    eventually(lambda: state() == "slow")
    assert seen[-1] == {"status": "slow", "engines": 1, "answering": 1, "seconds": seen[-1]["seconds"]}
    assert 5 < seen[-1]["seconds"] < 30
    flag.unlink()
    eventually(lambda: state() == "ok")
    ray_serve.delete(APPLICATION)


def test_an_idle_model_has_no_engine_until_its_first_request(endpoint, url):
    deploy(endpoint, min_engines=0, max_engines=1, downscale_delay_s=1, upscale_delay_s=0)
    wait_for_engines(0)
    health = httpx.get(url.replace("/v1", "/healthz")).json()
    assert health["models"]["tiny"] == {"status": "idle"}
    card = httpx.get(f"{url}/models/tiny").json()
    assert card["source"] == str(endpoint.model)
    time.sleep(3)
    assert engines() == 0  # the queries above have not started one
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=120) as client:
        assert client.chat.completions.create(model="tiny", messages=question(), max_tokens=3).choices
    wait_for_engines(0)


def test_without_mlflow_only_its_adapters_are_missing_and_they_load_once_it_is_back(endpoint, tmp_path):
    place = tmp_path / "registry.db"
    place.write_bytes(b"nothing that answers")
    registry = f"sqlite:///{place}"
    model = {
        "path": str(endpoint.model),
        "name": "tiny",
        "dtype": "float32",
        "adapters": {"team/shapes": "models:/shapes@champion", "blue": str(endpoint.adapters["blue"])},
        "engine": {"max_sequences": 4, "kv_budget_bytes": 2**23},
        "scaling": {"cpus_per_engine": 0.25},
    }
    settings = {"name": APPLICATION, "models": [model], "tracking_uri": registry, "adapter_poll_s": 0.5}
    with pytest.warns(UserWarning, match=r"registry\.db: .* 503 until engines can load it"):
        application = build(settings)
    ray_serve.run(application, name=APPLICATION, route_prefix="/faulty")
    url = f"{endpoint.url}/faulty"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=120) as client:

        def ask(name, stream=False):
            found = client.chat.completions.create(
                model=name, messages=question(), max_tokens=3, stream=stream
            )
            return list(found) if stream else found

        def state():
            return httpx.get(f"{url}/healthz").json()["models"]["tiny"]

        assert ask("tiny").usage.visual_tokens["cached"] == 16
        assert ask("blue").choices
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="'team/shapes' is not loaded yet") as info:
                ask("team/shapes", stream)
            assert (info.value.status_code, info.value.code) == (503, "adapter_not_loaded")
            assert info.value.response.headers["retry-after"] == "1"
        body = {"model": "team/shapes", "messages": question()}
        assert httpx.post(f"{url}/v1/overlay", json=body).status_code == 503
        away = "its registry does not respond"
        assert (state()["status"], state()["not_loaded"]) == ("ok", {"team/shapes": away})
        card = client.models.retrieve("team/shapes")
        assert (card.source, card.skip, card.not_loaded) == ("models:/shapes@champion", None, away)
        register(endpoint.adapters["red"], registry.replace("registry", "new"), tmp_path)
        shutil.copyfile(tmp_path / "new.db", place)  # keep the file, which MLflow has open
        deadline = time.monotonic() + 60
        while "not_loaded" in state():
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert ask("team/shapes").usage.visual_tokens["cached"] == 6
        assert ask("tiny").usage.visual_tokens["cached"] == 16
        assert client.models.retrieve("team/shapes").source == "models:/shapes/1"
    ray_serve.delete(APPLICATION)


def test_draining_finishes_the_open_requests(endpoint):
    deploy(endpoint)
    outcomes = []

    def ask(stream):
        options = {"model": "tiny", "messages": question(), "max_tokens": 400, "response_format": LONG}
        with openai.OpenAI(base_url=f"{endpoint.url}/faulty/v1", api_key="x", max_retries=0) as client:
            found = client.chat.completions.create(stream=stream, **options)
            last = [*found][-1] if stream else found
            outcomes.append(last.choices[0].finish_reason)

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    drain(serve_config({"name": APPLICATION, "model": str(endpoint.model)}))
    for thread in threads:
        thread.join(1)
    assert len(outcomes) == 2
    assert set(outcomes) <= {"stop", "length"}
    assert httpx.get(f"{endpoint.url}/faulty/healthz").status_code == 404
