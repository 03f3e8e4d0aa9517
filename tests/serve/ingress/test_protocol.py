"""What HTTP promises on every route: HEAD, request ids, HTTP/1.0, trailing slashes."""

import json
import re
import socket

import httpx2 as httpx
import pytest

from tests.serve.conftest import question

GET_ROUTES = ("/", "/page/page.css", "/healthz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/red")
RAYS = ("/-/healthz", "/-/routes")
UNKNOWN = ("/none", "/v1", "/v1/", "/-/none", "//", "/healthz/")
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("path", GET_ROUTES)
def test_head_is_get_without_a_body(endpoint, path):
    head, get = httpx.head(endpoint.url + path), httpx.get(endpoint.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path not in ("/metrics", "/healthz"):  # these change
        assert head.headers["content-length"] == str(len(get.content))


@pytest.mark.parametrize(("path", "status"), [(CHAT, 405), ("/v1/models/none", 404), ("/none", 404)])
def test_head_has_the_status_of_get(endpoint, path, status):
    response = httpx.head(endpoint.url + path)
    assert (response.status_code, response.content) == (status, b"")


def test_a_refused_method_names_those_that_are_allowed(endpoint):
    response = httpx.post(f"{endpoint.url}/healthz")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")


def test_the_list_of_models_may_have_a_slash(endpoint):
    found = httpx.get(f"{endpoint.url}/v1/models/")
    assert found.status_code == 200
    assert found.json() == httpx.get(f"{endpoint.url}/v1/models").json()


@pytest.mark.parametrize("path", [*GET_ROUTES, *RAYS, *UNKNOWN])
@pytest.mark.parametrize(
    "given",
    ["x" * 129, "x" * 30_000, "a b", "<script>", "a\tb", "é", "", '"', "a,b", "{}", "a;b"],
    ids=lambda value: value[:8],
)
def test_other_request_ids_are_replaced_on_every_path(endpoint, path, given):
    headers = {"x-request-id": given.encode()}
    found = httpx.get(endpoint.url + path, headers=headers).headers.get_list("x-request-id")
    assert len(found) == 1
    assert re.fullmatch(r"[\w-]{32,36}", found[0])


@pytest.mark.parametrize("path", [*GET_ROUTES, *RAYS, *UNKNOWN])
def test_plain_request_ids_are_kept_on_every_path(endpoint, path):
    found = httpx.get(endpoint.url + path, headers={"X-Request-ID": "mine:1/2+3=4.5_6-7"})
    assert found.headers.get_list("x-request-id") == ["mine:1/2+3=4.5_6-7"]


def ask_http_1_0(url, method, path, body=b""):
    """Return the status, head and body of the response to an HTTP/1.0 request."""
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port), 60) as connection:
        fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        head = f"{method} {path} HTTP/1.0\r\n{fields}\r\n\r\n"
        connection.sendall(head.encode() + body)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    top, _, rest = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), top.decode().lower(), rest


@pytest.mark.parametrize("path", [*GET_ROUTES, *RAYS, "/none"])
def test_http_1_0_clients_get_no_chunks(endpoint, path):
    status, head, body = ask_http_1_0(endpoint.url, "GET", path)
    assert status == (404 if path == "/none" else 200)
    assert "transfer-encoding" not in head
    assert f"content-length: {len(body)}" in head.split("\r\n")


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_clients_get_answers(endpoint, stream):
    request = {"model": "red", "messages": question(), "max_tokens": 3, "stream": stream}
    status, head, body = ask_http_1_0(endpoint.url, "POST", CHAT, json.dumps(request).encode())
    assert status == 200, body
    assert "transfer-encoding" not in head
    if stream:
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["usage"]["completion_tokens"] > 0
