"""A damaged adapter is reported before Ray starts, without the base model's weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.engines.model import EngineModel, check_model
from skipvision.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    sv.attach(model, sv.SkipConfig(retained=4, skipped=4, summary_tokens=2))
    return sv.save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter")


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def with_weights(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]):
    def damage(folder: Path) -> None:
        changed = [change(*one) for one in load_file(folder / WEIGHTS).items()]
        save_file(dict(filter(None, changed)), folder / WEIGHTS)

    return damage


def empty_summary(folder: Path) -> None:
    (folder / "skip_summary.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "its files are damaged"),
        (empty_summary, "summary layer cannot be read"),
        (with_weights(lambda name, value: (name, value[:1].contiguous())), "does not fit this model"),
        (with_weights(lambda name, value: None if "lora_B" in name else (name, value)), "lora_B"),
        (with_weights(lambda name, value: (name.replace("q_proj", "v_proj"), value)), "q_proj"),
    ],
    ids=["truncated", "no summary", "other shapes", "missing tensors", "other names"],
)
def test_a_damaged_adapter_is_reported_without_the_base_models_weights(
    tiny_model, adapter, tmp_path, damage, message
):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    skip = sv.read_adapter(folder)["skip"]
    model = EngineModel(str(tiny_model), "tiny", folder, "label", skip, "float32", "sdpa")
    assert check_model(model).model_type == "llava"
    damage(folder)
    with pytest.raises(AdapterError, match=message):
        check_model(model)
