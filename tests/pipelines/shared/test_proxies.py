"""No client of ours sends a request for this machine to a proxy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.request import getproxies, proxy_bypass

import pytest
from requests.utils import should_bypass_proxies

from pipelines.score.rules.judge_endpoint import JudgeConfig, JudgeEndpoint
from pipelines.shared.proxies import bypass_proxies_on_loopback
from pipelines.tracking.client import configure_mlflow
from skipvision.errors import ConfigError

PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
REPLY = b'{"id":"1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":'
REPLY += b'"stop","message":{"role":"assistant","content":"yes"}}]}'


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in (*PROXIES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what the code sets is removed afterwards
        monkeypatch.delenv(name)


@pytest.fixture(params=PROXIES)
def proxy(request, monkeypatch) -> str:
    monkeypatch.setenv(request.param, "http://127.0.0.1:9")
    return request.param


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
@pytest.mark.parametrize("given", ["", "example.com", "example.com, other"])
def test_requests_to_loopback_pass_the_proxy_by(proxy, monkeypatch, host, given):
    monkeypatch.setenv("no_proxy", given)
    bypass_proxies_on_loopback()
    assert should_bypass_proxies(f"http://{host}:8265/api", None)
    assert proxy_bypass(host.strip("[]"))
    assert getproxies()
    assert not should_bypass_proxies("http://away.test/", None)
    assert bool(should_bypass_proxies("http://example.com/", None)) == bool(given)


def test_all_hosts_stay_excluded(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    bypass_proxies_on_loopback()
    assert should_bypass_proxies("http://away.test/", None)


def test_mlflow_on_loopback_passes_the_proxy_by(proxy):
    configure_mlflow()
    assert should_bypass_proxies("http://127.0.0.1:5000", None)


@pytest.fixture
def judge() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(REPLY)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.parametrize("value", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense"])
def test_a_judge_on_loopback_passes_the_proxy_by(proxy, monkeypatch, judge, value):
    monkeypatch.setenv(proxy, value)
    config = JudgeConfig(base_url=judge, model="m", api_key_env=None)
    assert JudgeEndpoint(config).reply("?") == "yes"


@pytest.mark.parametrize("value", ["gopher://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_proxy_that_the_judges_client_cannot_use_is_named(monkeypatch, value):
    monkeypatch.setenv("ALL_PROXY", value)
    with pytest.raises(ConfigError, match="cannot use the proxy of the environment"):
        JudgeEndpoint(JudgeConfig(base_url="http://away.test/v1", model="m", api_key_env=None))
