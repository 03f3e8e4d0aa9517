"""Model folders that cannot be used are refused before Ray starts, shortly and by their reason."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import LlamaConfig

import skipvision as sv
from pipelines.engines.backend import check_backend
from pipelines.engines.config import BackendSection
from pipelines.engines.loading import check_known, empty_model, load_config
from pipelines.engines.model import EngineModel, check_model
from skipvision.errors import ConfigError
from skipvision.loading import build_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def rename(folder, name):
    (folder / WEIGHTS).rename(folder / name)


def indexed(folder, **others):
    """Name the file of the weights and others in an index."""
    rename(folder, "model-1.safetensors")
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors", **others}})
    )


def of_config(**fields):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        for name, value in fields.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


DAMAGED = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights (model.safetensors, or"),
    "garbage": (lambda folder: (folder / WEIGHTS).write_bytes(b"xx"), "model.safetensors is damaged"),
    "nothing": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "model.safetensors is damaged"),
    "a page of a server": (lambda folder: (folder / WEIGHTS).write_text("<html>" * 99), "is damaged"),
    "a pointer of Git LFS": (
        lambda folder: (folder / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:1"
        ),
        "is damaged",
    ),
    "a copy that was cut off": (cut, "model.safetensors is damaged"),
    "an index that names a missing file": (
        lambda folder: indexed(folder, x="model-2.safetensors"),
        "model-2.safetensors does not exist",
    ),
    "an index that is none": (lambda folder: (folder / INDEX).write_text("{}"), "cannot be read"),
    "an unknown type": (of_config(model_type="evil"), "does not recognize this architecture"),
    "an unknown part": (of_config(text_config={"model_type": "evil"}), "Choose a model that transformers"),
    "code of a part": (
        of_config(text_config={"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}),
        "such code is never run",
    ),
    "code of a tower": (
        of_config(vision_config={"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}),
        "such code is never run",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_folder_that_cannot_be_loaded_is_refused(tiny_model, tmp_path, name):
    change, reason = DAMAGED[name]
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError) as caught:
        check_known(str(folder), "model.path")
    text = str(caught.value)
    assert text.startswith(f"model.path = {folder}")
    assert reason in text
    assert len(text) < 800


def test_sound_weights_in_several_files_pass(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    indexed(folder)
    check_known(str(folder), "model.path")


def test_a_text_only_model_takes_no_images(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    LlamaConfig(num_hidden_layers=1).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"model\.path = .* LlamaConfig takes no images") as caught:
        empty_model(load_config(str(folder)))
    assert len(str(caught.value)) < 400
    model = EngineModel(str(folder), "x", None, None, sv.SkipConfig.full(), "float32", "sdpa")
    with pytest.raises(ConfigError, match="takes no images"):
        check_model(model)
    with pytest.raises(ConfigError, match="LlamaConfig is not the config of an image-text-to-text"):
        build_model(LlamaConfig())


def test_settings_of_generation_that_the_engine_refuses(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    model = EngineModel(str(folder), "x", None, None, sv.SkipConfig.full(), "float32", "sdpa")
    check_backend(model, BackendSection())
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 4, "max_time": 2.0}))
    with pytest.raises(ConfigError, match=r"generation_config: num_beams=4: .*; max_time=2\.0: "):
        check_backend(model, BackendSection())
    (folder / "generation_config.json").unlink()
    check_backend(model, BackendSection())
