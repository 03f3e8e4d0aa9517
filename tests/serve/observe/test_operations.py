"""Operations: adapters that follow their alias, traces, logs, CORS, limits of keys, slow clients."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest
import ray

from tests.backend import on_native
from tests.serve.conftest import KEPT, LONG, ORIGIN, eventually, question, register

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def client(guarded):
    with openai.OpenAI(base_url=guarded.url, api_key=guarded.bob, max_retries=0, timeout=60) as client:
        yield client


def test_an_adapter_follows_its_alias_without_a_restart(guarded, endpoint, client, tmp_path):
    def source():
        return client.models.retrieve("shapes").source

    def answer():
        return client.chat.completions.create(
            model="shapes", messages=question(), max_tokens=4, temperature=0
        )

    assert source() == "models:/shapes/1"
    assert client.models.retrieve("small").skip["retained"] == 1.0  # the base model's default
    assert answer().usage.visual_tokens["cached"] == KEPT
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
    assert answer().usage.visual_tokens["cached"] == KEPT


@on_native
def test_a_skip_without_summary_tokens_has_none_if_the_model_has_none(client):
    options = {
        "messages": question(),
        "max_tokens": 2,
        "extra_body": {"skip": {"retained": 4, "skipped": 6}},
    }
    answer = client.chat.completions.create(model="small", **options)
    assert answer.usage.visual_tokens["cached"] == 4


def test_a_request_is_one_trace_under_the_clients_span(guarded, client):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    client.chat.completions.create(model="small", messages=question(), max_tokens=3, extra_headers=headers)

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


def test_logs_are_json_with_the_request_id_and_without_the_prompt(client):
    given = f"id-{time.time_ns()}"
    secret = "a secret in the prompt"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="small", messages=question(secret), n=7, extra_headers={"x-request-id": given}
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


def test_only_the_named_origins_may_send_requests(guarded, endpoint):
    preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
    allowed = httpx.options(f"{guarded.url}/chat/completions", headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    stranger = httpx.options(
        f"{guarded.url}/chat/completions", headers={**preflight, "origin": "https://b.example"}
    )
    default = httpx.options(f"{endpoint.url}/v1/chat/completions", headers=preflight)
    answered = httpx.get(f"{endpoint.url}/v1/models", headers={"origin": ORIGIN})
    for response in (stranger, default, answered):
        assert "access-control-allow-origin" not in response.headers


def test_a_key_has_no_more_requests_at_once_than_its_entry_allows(guarded):
    with openai.OpenAI(base_url=guarded.url, api_key=guarded.alice, max_retries=0, timeout=60) as alice:
        options = {"model": "small", "messages": question(), "max_tokens": 400, "response_format": LONG}
        first = alice.chat.completions.create(stream=True, **options)
        next(iter(first))
        with pytest.raises(
            openai.RateLimitError, match="the API key 'alice' has 1 requests running"
        ) as caught:
            alice.chat.completions.create(**options)
        assert caught.value.response.headers["retry-after"] == "2"
        assert alice.models.list().data  # this needs no engine
        first.close()

        def again():
            try:
                return alice.chat.completions.create(**{**options, "max_tokens": 1, "response_format": None})
            except openai.RateLimitError:
                return None

        eventually(again)


def test_a_stream_that_nobody_reads_blocks_nobody(guarded):
    where = httpx.URL(guarded.url)
    options = {"model": "small", "messages": question(), "max_tokens": 400, "response_format": LONG}
    body = json.dumps({**options, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = f"POST {where.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += (
        f"Authorization: Bearer {guarded.alice}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as unread:
        unread.settimeout(30)
        # Keeps the buffers of both ends small: the sender's grows with the size of its segments.
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        unread.connect((where.host, where.port))
        unread.sendall(head.encode() + body)
        read = unread.recv(1)  # it has begun

        def try_next():
            """Send a request with the same key, which may have one at a time, to the engine of one row."""
            with openai.OpenAI(base_url=guarded.url, api_key=guarded.alice, max_retries=0) as alice:
                try:
                    return alice.chat.completions.create(model="small", messages=question(), max_tokens=2)
                except openai.RateLimitError:
                    return None

        eventually(try_next)
        while piece := unread.recv(2**16):
            read += piece
    assert len(read) > 300_000  # more than all buffers in between hold
    assert b"data: [DONE]" in read[-100:]


@pytest.mark.slow
@on_native  # test_vllm.py has this for vLLM, whose start takes longer than these requests wait
def test_an_engine_that_dies_interrupts_only_the_stream_that_has_begun(guarded, client):
    options = {"model": "small", "messages": question(), "max_tokens": 400, "response_format": LONG}
    (engine,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if ":guarded:engine-small" in "".join(process.cmdline()[:1])
    ]
    stream = client.chat.completions.create(stream=True, **options)
    next(stream)
    with ThreadPoolExecutor(2) as threads:
        whole = [threads.submit(client.chat.completions.create, **options) for _ in range(2)]
        time.sleep(0.1)  # the stream is running, and the others wait for its row
        engine.kill()
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "engine_died"
        assert {each.result().choices[0].finish_reason for each in whole} <= {"stop", "length"}
