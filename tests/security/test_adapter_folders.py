"""An adapter folder runs no code and reads no other file (CVE-2026-27893, CVE-2026-7669, CVE-2026-5241)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

import skipvision as sv
from serve.app import build
from skipvision.errors import AdapterError
from skipvision.loading import load_model
from tests.security.folders import CODE, RAN, Pickled


@pytest.fixture(scope="module")
def sound(tiny_model, tmp_path_factory) -> Path:
    """An adapter of the tiny model with a summary layer."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load_model(tiny_model), LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    )
    sv.attach(model, sv.SkipConfig(retained=4, skipped=4, summary_tokens=2))
    return sv.save_adapter(model, tmp_path_factory.mktemp("adapter") / "sound")


def peft(**fields):
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return change


def pickled(file: str, instead: str):
    def change(folder: Path) -> None:
        (folder / instead).unlink()
        (folder / file).write_bytes(pickle.dumps(Pickled()))

    return change


def not_a_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)


def pickle_named_safetensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Pickled()))


def pickled_summary(folder: Path) -> None:
    (folder / "skip_summary.safetensors").write_bytes(pickle.dumps(Pickled()))


REFUSED = {
    "pickled weights": (pickled("adapter_model.bin", "adapter_model.safetensors"), "pickled"),
    "a pickle named safetensors": (pickle_named_safetensors, "damaged"),
    "a pickled summary layer": (pickled_summary, "cannot be read"),
    "a module to import": (peft(megatron_config={"a": 1}, megatron_core="code"), "megatron_config"),
    "a cache of CorDA": (peft(corda_config={"cache_file": "adapter_model.bin"}), "corda_config"),
    "a config of EVA": (peft(eva_config={"rho": 2.0}), "eva_config"),
    "virtual tokens": (
        peft(
            peft_type="PROMPT_TUNING",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="a",
            num_virtual_tokens=1,
            tokenizer_name_or_path="{folder}",
            tokenizer_kwargs={"trust_remote_code": True},
        ),
        "PROMPT_TUNING",
    ),
    "a pickle as start of prompts": (
        peft(
            peft_type="MULTITASK_PROMPT_TUNING",
            prompt_tuning_init="EXACT_SOURCE_TASK",
            prompt_tuning_init_state_dict_path="adapter_model.bin",
        ),
        "MULTITASK_PROMPT_TUNING",
    ),
    "adapters of other folders": (peft(peft_type="XLORA", adapters={"0": "/etc"}), "XLORA"),
    "an unknown type": (peft(peft_type="CODE"), "damaged"),
    "nested JSON": (not_a_config, "cannot be read"),
}
IGNORED = {
    "auto_mapping": peft(auto_mapping={"base_model_class": "Model", "parent_library": "code"}),
    "another base model": peft(base_model_name_or_path="attacker/model", revision="main"),
}


@pytest.fixture
def hostile(sound, tmp_path, monkeypatch) -> Path:
    """A copy of the adapter with code beside its files, on the path and in the working directory."""
    folder = tmp_path / "adapter"
    shutil.copytree(sound, folder)
    (folder / "code.py").write_text(CODE)
    monkeypatch.setenv(RAN, str(tmp_path / "ran"))
    monkeypatch.chdir(folder)
    yield folder
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hostile_adapter_is_refused(kind, hostile, tiny_model):
    change, reason = REFUSED[kind]
    change(hostile)
    with pytest.raises(AdapterError, match=reason) as refusal:
        sv.load_adapter(load_model(tiny_model), hostile)
    assert str(hostile) in str(refusal.value)


@pytest.mark.parametrize("kind", IGNORED)
def test_what_peft_does_not_need_is_ignored(kind, hostile, tiny_model):
    IGNORED[kind](hostile)
    sv.load_adapter(load_model(tiny_model), hostile)


@pytest.mark.parametrize("kind", ["pickled weights", "a module to import", "virtual tokens"])
def test_the_endpoint_refuses_a_hostile_adapter_before_it_starts(kind, hostile, tiny_model):
    change, reason = REFUSED[kind]
    change(hostile)
    with pytest.raises(AdapterError, match=reason):
        build({"model": str(tiny_model), "adapter": str(hostile)})


def test_a_registered_adapter_is_checked_like_a_folder(hostile, tiny_model, tmp_path):
    from pipelines.engines.config import ModelSection
    from pipelines.engines.model import find_model
    from pipelines.tracking.config import TrackingConfig
    from pipelines.tracking.run import Tracker

    change, reason = REFUSED["pickled weights"]
    change(hostile)
    os.chdir(tmp_path)
    registry = TrackingConfig().absolute_uri(tmp_path)
    tracker = Tracker.start(registry, experiment="x", run_name="x", artifacts=tmp_path / "artifacts")
    tracker.register(hostile, "shapes", "champion")
    tracker.close()

    class Settings:
        model = ModelSection(path=str(tiny_model), adapter="models:/shapes@champion")
        skip = None

    with pytest.raises(AdapterError, match=reason):
        find_model(Settings(), registry, tmp_path / "downloads", None)
