"""What stands around requests: ids, sizes, keys, back-pressure, metrics; and settings that are wrong."""

import asyncio
import json
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest
import ray

from pipelines.shared.config import load_config
from serve.app import build
from serve.config import ServeConfig, serve_config
from serve.front import AGE
from serve.ingress.middleware import AccessLog
from serve.observe.metrics_page import merge
from serve.replica.autoscaling import ByLoad
from serve.replica.replica import load_of
from skipvision import ConfigError
from skipvision.engine import Statistics
from tests.serve.conftest import LONG, asking

ROOT = Path(__file__).parents[3]


def test_every_answer_has_an_id_and_the_clients_own_is_kept(endpoint):
    given = httpx.get(f"{endpoint.url}/v1/models", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = httpx.get(f"{endpoint.url}/nowhere")
    assert len(made.headers["x-request-id"]) >= 32
    long = httpx.get(f"{endpoint.url}/healthz", headers={"x-request-id": "mine" * 50})
    assert len(long.headers["x-request-id"]) == 36


@pytest.mark.parametrize(("age", "seconds"), [(None, 0), (b"5.250", 5.25), (b"-5.000", 0), (b"nan", 0)])
def test_the_time_that_another_ingress_had_counts(age, seconds):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["arrived"])

    headers = [] if age is None else [(AGE, age)]
    begin = time.monotonic()
    asyncio.run(AccessLog(app, 9)({"type": "http", "method": "GET", "headers": headers}, None, None))
    assert begin <= seen[0] + seconds <= time.monotonic()


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "x-session-id"])
def test_headers_that_ray_reads_do_it_no_harm(endpoint, name):
    with socket.create_connection(("127.0.0.1", httpx.URL(endpoint.url).port), 10) as raw:
        raw.sendall(f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{name}: ".encode() + b"\xff\r\n\r\n")
        assert raw.recv(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies_are_refused_while_they_arrive(endpoint, announced):
    piece, sent = b"x" * 2**20, 0

    def body():
        nonlocal sent
        for _ in range(200):
            sent += len(piece)
            yield piece

    content = piece * 33 if announced else body()
    headers = {"content-type": "application/json"}
    try:
        response = httpx.post(
            f"{endpoint.url}/v1/chat/completions", content=content, headers=headers, timeout=30
        )
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        assert not announced
        assert sent < 150 * 2**20
        return
    assert response.status_code == 413
    assert "larger than" in response.json()["error"]["message"]


def test_metrics_of_engine_and_http(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none") as client:
        client.chat.completions.create(model="red", messages=asking(), max_tokens=2)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="none", messages=asking())
    wanted = [
        'skipvision_http_requests_total{.*status="404"',
        'skipvision_errors_total{.*kind="model_not_found"',
        "skipvision_(first|output)_token_seconds_count{",
        *(
            f'stage_seconds_sum{{.*stage="{name}"'
            for name in ("media", "prepare", "prefill", "decode", "rest")
        ),
        *(f"skipvision_engine_{name}{{" for name in ("kv_occupancy", "running", "waiting", "decode_steps")),
        "skipvision_visual_tokens_saved_total{",
    ]
    deadline = time.monotonic() + 20
    while True:
        page = httpx.get(f"{endpoint.url}/metrics")
        assert page.status_code == 200
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        missing = [name for name in wanted if not re.search(name, page.text)]
        if not missing:
            return
        assert time.monotonic() < deadline, (missing, page.text[-3000:])
        time.sleep(0.3)


def test_pages_of_several_nodes_become_one():
    lines = [
        "# HELP ray_skipvision_a of a",
        "# TYPE ray_skipvision_a gauge",
        'ray_skipvision_a{n="1"} 1',
        "# HELP other x",
        "# TYPE other gauge",
        "other 3",
    ]
    one = "\n".join(lines)
    two = one.replace('n="1"} 1', 'n="2"} 5')
    assert merge([one, two, ""]).splitlines() == [
        "# HELP ray_skipvision_a of a",
        "# TYPE ray_skipvision_a gauge",
        'ray_skipvision_a{n="1"} 1',
        'ray_skipvision_a{n="2"} 5',
    ]


def test_keys(guarded):
    url, alice, bob = guarded.url, guarded.alice, guarded.bob
    for key in (alice, bob):
        with openai.OpenAI(base_url=url, api_key=key) as client:
            assert [card.id for card in client.models.list().data] == ["small", "shapes"]
    with openai.OpenAI(base_url=url, api_key="sk-skip-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="small", messages=asking())
    root, known = url.removesuffix("/v1"), {"authorization": f"Bearer {bob}"}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert httpx.get(root + path).status_code == 401, path
        assert httpx.get(root + path, headers=known).status_code == (404 if path == "/nowhere" else 200), path
    for path in ("/", "/page/page.css", "/healthz"):
        assert httpx.get(root + path).status_code == 200, path
    for path, operations in httpx.get(f"{root}/openapi.json", headers=known).json()["paths"].items():
        for operation in operations.values():
            told = "security" in operation, "401" in operation["responses"]
            assert told == ((False, False) if path in ("/", "/healthz") else (True, True)), path
    wrong = httpx.post(f"{url}/chat/completions", content=b"{no", headers={"authorization": "Bearer no"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_is_asked_for_before_anything_of_the_body_is_read(guarded):
    where = httpx.URL(guarded.url)
    with socket.create_connection((where.host, where.port), timeout=10) as connection:
        head = f"POST {where.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_too_many_requests_are_told_to_come_back(guarded):
    url, bob = guarded.url, guarded.bob
    outcomes, cards, health = [], [], []

    def ask(stream):
        with openai.OpenAI(base_url=url, api_key=bob, max_retries=0, timeout=60) as client:
            try:
                found = client.chat.completions.create(
                    model="small", messages=asking(), max_tokens=400, response_format=LONG, stream=stream
                )
                if stream:
                    list(found)
                outcomes.append("answered")
            except openai.RateLimitError as error:
                outcomes.append((error.status_code, error.code, error.response.headers["retry-after"]))

    def look():
        headers = {"authorization": f"Bearer {bob}"}
        while len(outcomes) < 16:
            time.sleep(0.2)
            cards.append(httpx.get(f"{url}/models/small", headers=headers, timeout=60))
            health.append(httpx.get(url.replace("/v1", "/healthz"), timeout=60))

    threads = [threading.Thread(target=ask, args=(number % 2 == 1,)) for number in range(16)]
    threads += [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Full is not down.
    assert {each.status_code for each in health} == {200}
    assert "saturated" in {each.json()["models"]["small"]["status"] for each in health}
    assert {each.status_code for each in cards} == {200}
    assert outcomes.count("answered") >= 2
    refused = [outcome for outcome in outcomes if outcome != "answered"]
    assert refused == [(429, "overloaded", "2")] * len(refused)
    assert refused


def test_an_engine_has_its_rows_full_and_requests_that_wait(guarded):
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")
    details = ray.get(controller.get_serve_instance_details.remote())
    engine = details["applications"]["guarded"]["deployments"]["engine-small"]["deployment_config"]
    assert engine["max_ongoing_requests"] == 1 + 2


def test_wrong_settings_are_all_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing to serve"):
        build({})
    with pytest.raises(ConfigError, match="adapter without model"):
        build({"adapter": "x"})
    with pytest.raises(ConfigError) as caught:
        build({"model": "x", "limits.images": -1, "limits.imagess": 3})
    assert "limits.images = -1" in str(caught.value)
    assert "limits.imagess" in str(caught.value)
    with pytest.raises(ConfigError, match=r"there is no .*missing"):
        build({"model": str(tmp_path / "missing")})
    with pytest.raises(ConfigError, match="names used twice: a"):
        build({"models": [{"path": "m/a"}, {"path": "n/a"}]})


def test_flat_settings_are_one_model():
    config = serve_config({"model": "m/base", "adapter": "runs/a", "limits.images": 2})
    assert config.served() == {"base": (0, None), "adapter": (0, "adapter")}
    assert config.limits.images == 2
    again = ServeConfig.model_validate(json.loads(config.model_dump_json()))
    assert again.served() == config.served()


def test_both_ways_to_start_serve_what_the_page_asks_for():
    page = (ROOT / "docs/serving.md").read_text()
    words = re.search(r"serve run serve\.app:build (.*)", page)[1].split()
    options = re.search(r"jobs/deploy\.py (--config .*)", page)[1].split()
    flat = serve_config(dict(word.split("=") for word in words))
    job = load_config(
        ServeConfig, [option.replace("jobs/", f"{ROOT}/jobs/") for option in options], description=""
    )
    assert flat.served() == job.served()
    assert re.search(r'model="([^"]+)"', page)[1] in job.served()
    assert f'base_url="http://{job.host}:{job.port}/v1"' in page
    assert job.port == flat.port


@pytest.mark.parametrize(
    ("running", "waiting", "reserved", "load"),
    [(0, 0, 0, 0.0), (2, 0, 20, 0.5), (4, 4, 40, 2.0), (4, 12, 40, 4.0), (2, 2, 90, 1.8)],
)
def test_load_is_by_rows_or_by_memory(running, waiting, reserved, load):
    numbers = dict.fromkeys(Statistics.__dataclass_fields__, 0)
    numbers |= {"running": running, "waiting": 1, "waiting_answers": waiting, "max_sequences": 4}
    numbers |= {"kv_bytes_reserved": reserved, "kv_bytes_budget": 100}
    assert load_of(Statistics(**numbers)) == pytest.approx(load)


@pytest.mark.parametrize(
    ("loads", "requests", "queued", "engines"),
    [
        ([], 0, 0, 0),
        ([], 1, 1, 1),
        ([0.0], 1, 0, 1),  # which its engine has not counted yet
        ([1.0, 1.0], 8, 0, 2),
        ([2.5, 0.5], 8, 0, 3),
        ([1.0], 12, 8, 3),  # held at an ingress
    ],
)
def test_engines_are_as_many_as_the_load_takes(loads, requests, queued, engines):
    context = SimpleNamespace(
        aggregated_metrics={"load": dict(enumerate(loads))} if loads else None,
        total_num_requests=requests,
        total_queued_requests=queued,
    )
    assert ByLoad(target=1.0, rows=4)(context) == (engines, {})
