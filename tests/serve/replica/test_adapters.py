"""Adapters from MLflow's registry, in an engine without Ray."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from mlflow import MlflowClient

import serve.replica.adapters
from pipelines.engines.loading import load_base, load_processor
from pipelines.engines.thread import EngineThread
from pipelines.tracking.config import TrackingConfig
from serve.errors import NotLoadedError
from serve.replica.adapters import ServedAdapters
from serve.replica.native import NativeAdapters
from serve.reporting import problem_of
from skipvision import AdapterError, SkipConfig
from skipvision.engine import BASE, Engine
from tests.serve.conftest import free_port, register


@pytest.fixture(scope="module")
def filled(tmp_path_factory, adapters):
    """A registry whose versions 1 and 2 are adapters, and whose version 3 is an empty folder."""
    folder = tmp_path_factory.mktemp("registry")
    uri = TrackingConfig().absolute_uri(folder)
    (folder / "broken").mkdir()
    for source in (adapters["red"], adapters["blue"], folder / "broken"):
        register(source, uri, folder)
    return uri


@pytest.fixture
def registry(filled):
    MlflowClient(filled, filled).set_registered_model_alias("shapes", "champion", "2")
    return filled


@pytest.fixture
def engine(tiny_model):
    def make():
        base = load_base(str(tiny_model), torch.float32, "sdpa", torch.device("cpu"))
        return Engine(base, load_processor(str(tiny_model)), SkipConfig.full(), max_sequences=1)

    thread = EngineThread(make)
    thread.wait_until_ready()
    yield NativeAdapters(thread)
    thread.stop()


def test_an_alias_is_followed_forward_and_back_and_old_versions_leave_nothing(
    registry, engine, tmp_path, monkeypatch
):
    fetched = []

    def fetch(uri, name, folder):
        fetched.append(name)
        return real(uri, name, folder)

    real = serve.replica.adapters.fetch_model
    monkeypatch.setattr(serve.replica.adapters, "fetch_model", fetch)
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    client = MlflowClient(registry, registry)
    served = ServedAdapters({"shapes": "models:/shapes@champion"}, registry, 1)

    def name(version: int) -> str:
        client.set_registered_model_alias("shapes", "champion", str(version))
        for _ in range(2):
            served.update(engine)
        return served.versions["shapes"].source

    client.set_registered_model_alias("shapes", "champion", "1")
    served.load(engine)
    for version in (1, 2, 1, 1):
        assert name(version) == f"models:/shapes/{version}"
        assert engine.names() == [BASE, served.versions["shapes"].name]
    assert fetched == ["models:/shapes/1", "models:/shapes/2", "models:/shapes/1"]
    assert not list(copies.iterdir())


@contextlib.contextmanager
def mlflow_server(registry, port, log):
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", registry, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=environment, stdout=output, stderr=output) as server,
    ):
        try:
            yield
        finally:
            server.terminate()


@pytest.mark.slow
def test_adapters_of_a_registry_that_is_down_are_loaded_once_it_is_back(
    registry, adapters, engine, tmp_path, monkeypatch
):
    """Adapters in folders are loaded at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    sources = {"shapes": "models:/shapes@champion", "one": "models:/shapes/1", "plain": str(adapters["blue"])}
    served = ServedAdapters(sources, f"http://127.0.0.1:{port}", 2.5)
    served.load(engine)
    served.update(engine)
    assert served.version("plain").name in engine.names()
    assert served.missing == dict.fromkeys(("shapes", "one"), "its registry does not respond")
    with pytest.raises(
        NotLoadedError, match="'shapes' is not loaded yet: its registry does not respond"
    ) as info:
        served.version("shapes")
    problem = problem_of(info.value)
    assert (problem.status, problem.code, problem.headers) == (
        503,
        "adapter_not_loaded",
        {"Retry-After": "3"},
    )
    with mlflow_server(registry, port, tmp_path / "server.log"):
        for _ in range(600):
            served.update(engine)
            if not served.missing:
                break
            time.sleep(0.1)
    assert served.version("shapes").source == "models:/shapes/2"
    served.update(engine)
    assert engine.names() == [BASE, *(served.version(name).name for name in ("plain", "shapes", "one"))]


def test_adapters_may_have_any_name(registry, engine):
    names = ("team/shapes", "shapes.v1", "shapes_v1", "shapes%2Ev1", "lora_x", "keys", "__base__")
    served = ServedAdapters(dict.fromkeys(names, "models:/shapes@champion"), registry, 1)
    served.load(engine)
    assert engine.names() == [BASE, *(served.version(name).name for name in names)]
    assert len(set(engine.names())) == 1 + len(names)


@pytest.mark.parametrize(
    "source",
    [
        "models:/shapes@nobody",
        "models:/others@champion",
        "models:/shapes/7",
        "models:/shapes/3",  # damaged
    ],
)
def test_an_adapter_that_cannot_be_loaded_does_not_affect_others(registry, adapters, engine, source):
    served = ServedAdapters({"shapes": source, "plain": str(adapters["blue"])}, registry, 1)
    served.load(engine)
    assert served.missing == {"shapes": "its registry has no version that can be loaded"}
    assert served.version("plain").name in engine.names()


def test_a_folder_without_an_adapter_fails_the_start(engine, tmp_path):
    with pytest.raises(AdapterError, match="is not a Skip-Vision adapter"):
        ServedAdapters({"shapes": str(tmp_path / "none")}, None, 1).load(engine)


def test_a_damaged_adapter_does_not_stop_the_engine(registry, engine):
    client = MlflowClient(registry, registry)
    client.set_registered_model_alias("shapes", "champion", "3")
    served = ServedAdapters({"shapes": "models:/shapes@champion"}, registry, 1)
    served.update(engine)
    assert served.missing == {"shapes": "its registry has no version that can be loaded"}
    assert engine.names() == [BASE]
    client.set_registered_model_alias("shapes", "champion", "1")
    served.update(engine)
    assert served.version("shapes").source == "models:/shapes/1"
