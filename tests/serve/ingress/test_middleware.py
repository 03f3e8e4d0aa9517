"""Around every request: ids, size limit, keys, back-pressure, metrics."""

import asyncio
import re
import socket
import threading
import time

import httpx2 as httpx
import openai
import pytest
import ray

from serve.front import AGE
from serve.ingress.middleware import AccessLog
from serve.observe.metrics_page import merge
from tests.serve.conftest import LONG, question


def test_every_response_has_an_id_and_the_clients_own_is_kept(endpoint):
    given = httpx.get(f"{endpoint.url}/v1/models", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = httpx.get(f"{endpoint.url}/nowhere")
    assert len(made.headers["x-request-id"]) >= 32
    long = httpx.get(f"{endpoint.url}/healthz", headers={"x-request-id": "mine" * 50})
    assert len(long.headers["x-request-id"]) == 36


@pytest.mark.parametrize(("age", "seconds"), [(None, 0), (b"5.250", 5.25), (b"-5.000", 0), (b"nan", 0)])
def test_the_time_at_an_earlier_ingress_counts(age, seconds):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["arrived"])

    headers = [] if age is None else [(AGE, age)]
    begin = time.monotonic()
    asyncio.run(AccessLog(app, 9)({"type": "http", "method": "GET", "headers": headers}, None, None))
    assert begin <= seen[0] + seconds <= time.monotonic()


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "x-session-id"])
def test_malformed_control_headers_do_no_harm(endpoint, name):
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


def test_metrics_of_engines_and_http_are_exported(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none") as client:
        client.chat.completions.create(model="red", messages=question(), max_tokens=2)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="none", messages=question())
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


def test_metrics_of_several_nodes_are_merged():
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


def test_every_route_but_the_page_and_health_needs_a_key(guarded):
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
            client.chat.completions.create(model="small", messages=question())
    root, known = url.removesuffix("/v1"), {"authorization": f"Bearer {bob}"}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert httpx.get(root + path).status_code == 401, path
        assert httpx.get(root + path, headers=known).status_code == (404 if path == "/nowhere" else 200), path
    for path in ("/", "/page/page.css", "/healthz"):
        assert httpx.get(root + path).status_code == 200, path
    for path, operations in httpx.get(f"{root}/openapi.json", headers=known).json()["paths"].items():
        for operation in operations.values():
            needs_key = "security" in operation, "401" in operation["responses"]
            assert needs_key == ((False, False) if path in ("/", "/healthz") else (True, True)), path
    wrong = httpx.post(f"{url}/chat/completions", content=b"{no", headers={"authorization": "Bearer no"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")


def test_the_key_is_checked_before_the_body_is_read(guarded):
    where = httpx.URL(guarded.url)
    with socket.create_connection((where.host, where.port), timeout=10) as connection:
        head = f"POST {where.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_requests_over_the_limits_get_429_with_retry_after(guarded):
    url, bob = guarded.url, guarded.bob
    outcomes, cards, health = [], [], []

    def ask(stream):
        with openai.OpenAI(base_url=url, api_key=bob, max_retries=0, timeout=60) as client:
            try:
                found = client.chat.completions.create(
                    model="small",
                    messages=question(),
                    max_tokens=400,
                    response_format=LONG,
                    stream=stream,
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
    # A full engine is not down.
    assert {each.status_code for each in health} == {200}
    assert "saturated" in {each.json()["models"]["small"]["status"] for each in health}
    assert {each.status_code for each in cards} == {200}
    assert outcomes.count("answered") >= 2
    refused = [outcome for outcome in outcomes if outcome != "answered"]
    assert refused == [(429, "overloaded", "2")] * len(refused)
    assert refused


def test_an_engine_admits_a_full_batch_and_its_queue(guarded):
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", "serve")
    details = ray.get(controller.get_serve_instance_details.remote())
    engine = details["applications"]["guarded"]["deployments"]["engine-small"]["deployment_config"]
    assert engine["max_ongoing_requests"] == 1 + 2
