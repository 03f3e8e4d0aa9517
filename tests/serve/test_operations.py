"""What those who run the endpoint rely on: adapters that follow their alias, traces, logs, CORS, limits."""

import json
import threading
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import ray

from tests.serve.conftest import LONG, ORIGIN, asking, register

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def client(guarded):
    with openai.OpenAI(base_url=guarded.url, api_key=guarded.bob, max_retries=0, timeout=60) as client:
        yield client


def eventually(check, seconds=20):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_adapter_follows_its_alias_without_a_restart(guarded, endpoint, client, tmp_path):
    def source():
        return client.models.retrieve("shapes").source

    def answer():
        return client.chat.completions.create(model="shapes", messages=asking(), max_tokens=4, temperature=0)

    assert source() == "models:/shapes/1"
    assert client.models.retrieve("small").skip["retained"] == 1.0  # the base model's default
    assert answer().usage.visual_tokens["cached"] == 6
    register(endpoint.adapters["blue"], guarded.registry, guarded.storage)
    eventually(lambda: source() == "models:/shapes/2")
    assert answer().usage.visual_tokens["cached"] == 16  # blue skips nothing
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    register(tmp_path / "broken", guarded.registry, guarded.storage)
    time.sleep(1.5)
    assert source() == "models:/shapes/2"
    assert answer().usage.visual_tokens["cached"] == 16
    register(endpoint.adapters["red"], guarded.registry, guarded.storage)
    eventually(lambda: source() == "models:/shapes/4")
    assert answer().usage.visual_tokens["cached"] == 6


def test_a_request_is_one_trace_under_the_clients_span(guarded, client):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    client.chat.completions.create(model="small", messages=asking(), max_tokens=3, extra_headers=headers)

    def mine():
        return {span.name: (service, span) for service, span in guarded.spans if span.trace_id.hex() == TRACE}

    names = ["chat", "media", "prepare", "queue", "prefill", "decode"]
    eventually(lambda: len(mine()) == len(names))
    spans = mine()
    assert sorted(spans, key=lambda name: spans[name][1].start_time_unix_nano) == names
    _, whole = spans["chat"]
    assert whole.parent_span_id.hex() == PARENT
    for name in names[1:]:
        service, span = spans[name]
        assert service == ("guarded-ingress" if name in ("media", "prepare") else "guarded-engine")
        assert span.parent_span_id == whole.span_id
        assert whole.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
    assert whole.end_time_unix_nano >= spans["decode"][1].end_time_unix_nano


def test_logs_are_json_with_the_requests_id_and_without_its_words(client):
    given = f"id-{time.time_ns()}"
    secret = "what only the asker knows"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="small", messages=asking(secret), n=7, extra_headers={"x-request-id": given}
        )
    logs = Path("/tmp/ray", ray.get_runtime_context().get_session_name(), "logs", "serve")

    def lines():
        found = [line for file in logs.glob("replica_*") for line in file.read_text().splitlines()]
        assert not [line for line in found if secret in line]
        return [json.loads(line) for line in found if given in line]

    eventually(lines)
    (line,) = lines()
    assert (line["message"], line["request_id"], line["status"]) == ("answered", given, 400)
    assert (line["method"], line["path"]) == ("POST", "/v1/chat/completions")


def test_other_origins_may_ask_only_where_they_are_named(guarded, endpoint):
    asked = {"origin": ORIGIN, "access-control-request-method": "POST"}
    allowed = httpx.options(f"{guarded.url}/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    stranger = httpx.options(
        f"{guarded.url}/chat/completions", headers={**asked, "origin": "https://b.example"}
    )
    default = httpx.options(f"{endpoint.url}/v1/chat/completions", headers=asked)
    answered = httpx.get(f"{endpoint.url}/v1/models", headers={"origin": ORIGIN})
    for response in (stranger, default, answered):
        assert "access-control-allow-origin" not in response.headers


def test_a_key_has_as_many_requests_at_once_as_its_entry_says(guarded):
    with openai.OpenAI(base_url=guarded.url, api_key=guarded.alice, max_retries=0, timeout=60) as alice:
        options = {"model": "small", "messages": asking(), "max_tokens": 400, "response_format": LONG}
        first = alice.chat.completions.create(stream=True, **options)
        next(iter(first))
        with pytest.raises(openai.RateLimitError, match="the API key 'alice' has 1 requests running"):
            alice.chat.completions.create(**options)
        assert alice.models.list().data  # which needs no engine
        first.close()

        def again():
            try:
                return alice.chat.completions.create(**{**options, "max_tokens": 1, "response_format": None})
            except openai.RateLimitError:
                return None

        eventually(again)


def test_a_stream_that_nobody_reads_holds_up_nobody(guarded, client):
    slow = client.chat.completions.create(
        model="small", messages=asking(), max_tokens=400, response_format=LONG, stream=True
    )
    done = threading.Event()

    def ask():
        client.chat.completions.create(model="small", messages=asking(), max_tokens=2)
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(20)
    slow.close()
