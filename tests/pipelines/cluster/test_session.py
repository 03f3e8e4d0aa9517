"""Every RAY_ADDRESS, folder and slow start ends in a Ray or in a message."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cluster import session
from pipelines.cluster.address import host_and_port, ray_address, short_folder, short_tmpdir
from skipvision.errors import ConfigError, ResourceError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("address", ["", " ", "local", " local "])
def test_no_address_starts_a_ray(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert ray_address() is None


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:6379", "127.0.0.1", 6379),
        ("head.cluster:6379", "head.cluster", 6379),
        ("[::1]:6379", "::1", 6379),
        ("ray://head:10001", "head", 10001),
        ("ray://head:10001/", "head", 10001),
    ],
)
def test_an_address_of_a_ray_is_joined(monkeypatch, address, host, port):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert ray_address() == address
    assert host_and_port(address) == (host, port)


def test_auto_is_left_to_ray(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert ray_address() == "auto"


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example/x", "http://"])
def test_the_address_of_a_dashboard_is_refused_with_both_ways_out(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"dashboard.*ray job submit.*HOST:6379.*unset"):
        ray_address()


@pytest.mark.parametrize(
    "address",
    [
        *(
            "foo",
            "foo:",
            ":6379",
            "host:abc",
            "host:0",
            "host:70000",
            "://host:1",
            "redis://host:6379",
            "a b:1",
        ),
        *("ray://", "ray://host", "None", "127.0.0.1:6379,127.0.0.2:6379"),
    ],
)
def test_nonsense_is_refused_with_the_forms(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"no address of a Ray: give HOST:PORT"):
        ray_address()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_an_address_at_which_nobody_listens_is_named_at_once(monkeypatch, form):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = form.format(free.getsockname()[1])
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(session, "in_ray_job", lambda: False)
    with pytest.raises(ResourceError, match=r"RAY_ADDRESS = .*no Ray can be joined there: .*refused"):
        session._connect()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_server_that_is_no_ray_is_named_within_seconds(monkeypatch, form):
    monkeypatch.setattr(session, "_CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = form.format(silent.getsockname()[1])
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(session, "in_ray_job", lambda: False)
        with pytest.raises(ResourceError, match=rf"RAY_ADDRESS = {address}: .*does not answer as a Ray does"):
            session._connect()


@pytest.mark.parametrize("length", [0, 60, 80, 200])
def test_processes_of_ray_get_a_temporary_folder_that_sockets_fit_into(monkeypatch, length):
    given = "/tmp/" + "x" * length
    monkeypatch.setenv("TMPDIR", given)
    with short_tmpdir():
        longest = os.environ["TMPDIR"] + "/pymp-00000000/listener-00000000"
        assert len(longest) <= 107
        assert (os.environ["TMPDIR"] == given) == (length <= 69)
    assert os.environ["TMPDIR"] == given


@pytest.mark.parametrize("length", [0, 40, 60, 90, 200])
def test_a_temporary_folder_too_long_for_sockets_is_replaced(monkeypatch, length):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * length)
    assert (short_folder() is None) == (length <= 36)


class Slow:
    """A Ray whose first ``failures`` starts fail."""

    def __init__(self, failures: int) -> None:
        self.failures, self.starts = failures, 0

    util = type("util", (), {"get_node_ip_address": staticmethod(lambda: "127.0.0.1")})

    def init(self, **options: object) -> None:
        self.starts += 1
        if self.starts <= self.failures:
            raise Exception("The current node timed out during startup.\nmore")

    def shutdown(self) -> None:
        pass


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_slow_start_is_tried_again_and_then_explained(monkeypatch, failures):
    ray = Slow(failures)
    monkeypatch.setattr(session, "_ray", lambda: ray)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    if failures < 2:
        session._start_local()
        assert ray.starts == failures + 1
    else:
        with pytest.raises(ResourceError, match=r"in 2 tries: The current node timed out.*\n.*overloaded"):
            session._start_local()
    assert os.environ["RAY_ADDRESS"] == "local"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_starts_in_a_folder_too_long_for_sockets_and_behind_a_proxy(tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"), "http://192.0.2.1:9")
    hidden = ("RAY_ADDRESS", "RAY_TMPDIR", "no_proxy", "NO_PROXY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    code = "import ray; from pipelines.cluster.session import ray_session\n"
    code += "with ray_session(): print(ray.is_initialized())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **proxies, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr
