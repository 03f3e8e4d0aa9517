"""What a client's name for a model refers to."""

import pytest

import skipvision as sv
from serve.config import serve_config
from serve.ingress.catalogue import ServedModel, Target
from tests.backend import on_native


@pytest.fixture
def served():
    models = []

    def make(path, **section):
        (model,) = serve_config({"models": [{"path": str(path), **section}]}).models
        models.append(ServedModel(model, None, 1))
        return models[-1]

    yield make
    for model in models:
        model.rendering.close()


@on_native  # where the adapters have summary tokens
def test_a_request_keeps_the_summary_tokens_of_an_exported_model(served, tiny_model, adapters, tmp_path):
    exported = sv.export(tiny_model, adapters["red"], tmp_path / "exported")
    requested = sv.SkipConfig(retained=3, skipped=6)
    assert Target(served(exported), None).skip_for(requested).summary_tokens == 1
    assert Target(served(exported), None).skip_for(None).retained == 4
    assert (
        Target(served(exported, skip=sv.SkipConfig.full().model_dump()), None).skip_for(None)
        == sv.SkipConfig.full()
    )
    assert Target(served(tiny_model), None).skip_for(requested).summary_tokens == 0
    assert Target(served(tiny_model), None).skip_for(None) is None


def test_vllm_limits_the_positions_of_a_model(served, tiny_model):
    def positions(length):
        engine = {"backend": "vllm", "engine_kwargs": {"max_model_len": length}}
        return served(tiny_model, engine=engine).max_positions

    assert [positions(length) for length in (100, 5000, "auto")] == [100, 512, 512]
