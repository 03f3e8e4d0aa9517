"""Deploying the endpoint: invalid settings are reported before Ray starts, other failures in one line."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import openai
import psutil
import pytest
import yaml
from ray import serve as ray_serve

import serve.deploy
from serve.app import application
from serve.config import serve_config
from serve.deploy import DeploymentError, run_deploy
from skipvision.errors import ConfigError, SkipVisionError
from tests.serve.conftest import eventually, free_port, question

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keys_file": "nope.yaml"}, r"the keys file /.*nope\.yaml cannot be read .*every node"),
        ({"keys_file": "wrong.yaml"}, r"the keys file .*wrong\.yaml is invalid: keys: is required"),
        ({"model": "owner/nope"}, "model = owner/nope: .* the hub does not answer"),
        ({"model": "empty"}, r"model = .*empty: this folder holds no model"),
        ({"adapter": "nope"}, "adapter adapter = nope: there is no"),
        ({"adapter": "empty"}, "empty is not a Skip-Vision adapter"),
        ({"adapter": "models:/nope", "tracking_uri": "sqlite:///m.db"}, "'models:/nope' names no model"),
        (
            {"adapter": "models:/m@a", "tracking_uri": "sqlite:///typo.db"},
            r"there is no /.*/typo\.db to look up models in",
        ),
    ],
)
def test_invalid_settings_are_reported_before_ray_starts(
    settings, message, tiny_model, tmp_path, monkeypatch
):
    def started():
        raise AssertionError("Ray was started")

    monkeypatch.setattr(serve.deploy, "ray_session", started)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "wrong.yaml").write_text("{}")
    with pytest.raises(SkipVisionError, match=message):
        run_deploy(serve_config({"model": str(tiny_model), **settings}))


def test_a_registry_that_is_down_only_warns(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away.db").write_bytes(b"nothing that answers")
    settings = {"adapter": "models:/shapes@champion", "tracking_uri": "sqlite:///away.db"}
    message = rf"models:/shapes@champion at sqlite:///{tmp_path}/away\.db.* 503 until engines"
    with pytest.warns(UserWarning, match=message):
        application(serve_config({"model": str(tiny_model), **settings}))


def test_an_adapter_from_a_registry_needs_the_registry():
    with pytest.raises(ValueError, match="models:/nope@champion without tracking_uri"):
        serve_config({"model": "m", "adapter": "models:/nope@champion"})


def test_a_ray_job_reads_no_copy_of_the_keys(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    (tmp_path / "keys.yaml").write_text("keys: []")
    with pytest.raises(ConfigError, match=r"keys_file = keys\.yaml: inside a Ray job .* throw-away copy"):
        run_deploy(serve_config({"model": str(tiny_model), "keys_file": "keys.yaml"}))


def test_ray_serve_has_one_address(endpoint, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "the session's")
    there, other = httpx.URL(endpoint.url), free_port()
    settings = {"name": "second", "model": str(endpoint.model), "port": other}
    with pytest.raises(ConfigError, match=rf"port = {other}: .* at 127\.0\.0\.1:{there.port}, .*shutdown"):
        run_deploy(serve_config(settings))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "Error:\nray::init()\n  File x\n    raise\nOSError: disk\n\na.ConfigError: no model\n",
            "no model",
        ),
        ("failed to be scheduled: no GPU", "no GPU"),
    ],
)
def test_the_failure_of_a_replica_is_reported_in_one_line(message, reason, monkeypatch, endpoint):
    def failing(*_, **__):
        raise RuntimeError("Failed to update the deployments")

    deployments = {
        "engine-a": SimpleNamespace(status="DEPLOY_FAILED", message=message),
        "ingress": SimpleNamespace(status="HEALTHY", message=""),
    }
    applications = {"skipvision": SimpleNamespace(deployments=deployments)}
    monkeypatch.setenv("RAY_ADDRESS", "the session's")
    monkeypatch.setattr(ray_serve, "run", failing)
    monkeypatch.setattr(ray_serve, "status", lambda: SimpleNamespace(applications=applications))
    port = httpx.URL(endpoint.url).port
    with pytest.raises(DeploymentError, match=rf"'skipvision' did not start: engine-a: [^\n]*{reason}$"):
        run_deploy(serve_config({"model": str(endpoint.model), "port": port}))


@pytest.mark.slow
def test_a_failed_deployment_ends_with_one_line_that_has_the_reason(tiny_model, tmp_path):
    model = {"path": str(tiny_model), "attention": "flash_attention_2"}
    file = tmp_path / "deploy.yaml"
    file.write_text(yaml.safe_dump({"models": [model], "port": free_port()}))
    command = [sys.executable, str(ROOT / "jobs/deploy.py"), "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 'skipvision' did not start: engine-tiny-llava: skipvision.errors.Config")
    assert "FlashAttention2" in last
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_stop_prints_nothing_of_rays(tiny_model, tmp_path):
    command = [sys.executable, str(ROOT / "jobs/deploy.py"), "--model", str(tiny_model)]
    file = tmp_path / "log"
    with file.open("wb") as log:
        job = subprocess.Popen(
            [*command, "--port", str(free_port())], stdout=log, stderr=log, start_new_session=True
        )
    try:
        eventually(lambda: "Ctrl-C" in file.read_text() or job.poll() is not None, 250)
        started = len(file.read_text())
        job.terminate()
        assert job.wait(120) == 0
        lines = file.read_text()[started:].strip().splitlines()
        assert lines[:-1] == ["SIGTERM: stopping and cleaning up …", "finishing the open requests …"]
        assert lines[-1].startswith('{"url":')
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
def test_haproxy_listens_if_the_settings_select_it(tiny_model, tmp_path):
    port = free_port()
    settings = ["--model", str(tiny_model), "--port", str(port), "--proxy", "haproxy"]
    command = [sys.executable, str(ROOT / "jobs/deploy.py"), *settings, "--ingresses", "2"]
    url = f"http://127.0.0.1:{port}"
    options = {"model": "tiny-llava", "messages": question(), "max_tokens": 8, "temperature": 0}
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        eventually(lambda: "Ctrl-C" in (tmp_path / "log").read_text() or job.poll() is not None, 120)
        children = psutil.Process(job.pid).children(recursive=True)
        listening = [
            each.name() for each in children for one in each.net_connections() if one.laddr.port == port
        ]
        assert set(listening) == {"haproxy"}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=2) as client:
            whole = client.chat.completions.create(**options).choices[0].message.content
            pieces = list(client.chat.completions.create(**options, stream=True))
            assert "".join(each.choices[0].delta.content or "" for each in pieces) == whole
            next(each for each in children if ":ingress" in each.cmdline()[0]).kill()
            assert client.chat.completions.create(**options).choices[0].message.content == whole
        id_of = httpx.get(f"{url}/healthz", headers={"x-request-id": "mine" * 50}).headers["x-request-id"]
        assert len(id_of) == 36  # `serve.front` is installed
        job.terminate()
        assert job.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
