"""Jobs run an exported model as it was tuned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.engines.config import ModelSection
from pipelines.engines.model import check_model, find_model, load_engine
from pipelines.shared.sections import EngineSection
from skipvision.engine import BASE
from skipvision.errors import ConfigError

EXPORTED = sv.SkipConfig(retained=2, skipped=2, summary_tokens=1)


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """An exported model whose summary layer matters."""
    folder = tmp_path_factory.mktemp("exported")
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    summary = sv.attach(model, EXPORTED).summary
    torch.manual_seed(1)
    summary.score.weight.data.normal_(0, 3)
    sv.save_adapter(model, folder / "adapter")
    return sv.export(tiny_model, folder / "adapter", folder / "model")


def found(path, tmp_path, skip=None):
    config = SimpleNamespace(model=ModelSection(path=str(path), dtype="float32"), skip=skip)
    return find_model(config, "sqlite:///none", tmp_path / "adapter", None)


def test_an_exported_model_runs_as_it_was_tuned(exported, tmp_path):
    model = found(exported, tmp_path)
    assert model.skip == EXPORTED
    check_model(model)
    with load_engine(model, EngineSection(), torch.device("cpu")) as engine:
        assert engine.configs[BASE] == EXPORTED
        weights = load_file(exported / "skip_vision/summary.safetensors")
        assert torch.equal(engine._attachment.summary.score.weight, weights["score.weight"])


def test_an_exported_model_runs_with_full_tokens_or_another_config(exported, tmp_path):
    full = found(exported, tmp_path, "full")
    assert full.skip == sv.SkipConfig.full()
    check_model(full)
    with load_engine(full, EngineSection(), torch.device("cpu")) as engine:
        assert engine.configs[BASE] == sv.SkipConfig.full()
    other = found(exported, tmp_path, sv.SkipConfig(retained=4, skipped=0, summary_tokens=2))
    with pytest.raises(ConfigError, match=r"summary_tokens=2, but this model is attached with 1"):
        check_model(other)
