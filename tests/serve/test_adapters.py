"""Adapters that follow an alias of MLflow's registry, in an engine without Ray around it."""

import tempfile

import pytest
import torch
from mlflow import MlflowClient

import serve.adapters
from pipelines.engine_thread import EngineThread
from pipelines.loading import load_base, load_processor
from pipelines.tracking import TrackingConfig
from serve.adapters import ServedAdapters
from skipvision import SkipConfig
from skipvision.engine import Engine
from tests.serve.conftest import register


@pytest.fixture
def registry(tmp_path, adapters):
    uri = TrackingConfig().absolute_uri(tmp_path)
    for name in ("red", "blue"):
        register(adapters[name], uri, tmp_path)
    return uri


def test_an_alias_is_followed_there_and_back_and_each_version_is_fetched_once(
    registry, tiny_model, tmp_path, monkeypatch
):
    fetched = []

    def fetch(uri, name, folder):
        fetched.append(name)
        return real(uri, name, folder)

    real = serve.adapters.fetch_model
    monkeypatch.setattr(serve.adapters, "fetch_model", fetch)
    copies = tmp_path / "copies"
    copies.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    client = MlflowClient(registry, registry)
    served = ServedAdapters({"shapes": "models:/shapes@champion"}, registry)

    def make() -> Engine:
        base = load_base(str(tiny_model), torch.float32, "sdpa", torch.device("cpu"))
        model, _ = served.begin(base)
        engine = Engine(model, load_processor(str(tiny_model)), SkipConfig.full(), max_sequences=1)
        served.complete(engine)
        return engine

    def name(version: int) -> str:
        client.set_registered_model_alias("shapes", "champion", str(version))
        for _ in range(2):
            served.look(engine)
        return served.versions["shapes"].source

    client.set_registered_model_alias("shapes", "champion", "1")
    engine = EngineThread(make)
    try:
        engine.wait_until_ready()
        for version in (1, 2, 1, 1):
            assert name(version) == f"models:/shapes/{version}"
            assert served.versions["shapes"].name in engine.call(lambda engine: engine.adapters).result()
        assert fetched == ["models:/shapes/1", "models:/shapes/2"]
        assert "shapes@2" not in engine.call(lambda engine: engine.adapters).result()
        assert not list(copies.iterdir())
    finally:
        engine.stop()
