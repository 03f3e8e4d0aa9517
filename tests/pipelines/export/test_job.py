"""The export job: a model in a folder, in MLflow's registry and on a hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.export.config import ExportConfig
from pipelines.export.hub import HubError
from pipelines.export.job import run_export
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.registry import ModelVersion, Registry
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError
from tests.pipelines.export.hub_server import TOKEN, Hub, hub_server

SKIP = sv.SkipConfig(retained=4, skipped=4)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, storage: Path) -> Path:
    """An adapter of a fine-tune, and version 1 of ``tuned`` in MLflow with an accuracy."""
    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    model = peft.get_peft_model(base, lora)
    sv.attach(model, SKIP)
    folder = sv.save_adapter(model, storage / "tuned" / "adapter")
    result = {
        "steps": 7,
        "exact_match": {"colour": 0.875},
        "mlflow_run_id": "run0",
        "adapter": "/secret/path",
    }
    (folder.parent / "run.json").write_text(json.dumps({"result": result}))
    uri = TrackingConfig().absolute_uri(storage)
    tracker = Tracker.start(uri, experiment="tests", run_name="tuned", artifacts=storage / "artifacts")
    tracker.metrics({"validation/exact_match/colour": 0.75, "system/cpu": 1.0, "loss": 0.5}, 1)
    tracker.flush()
    tracker.register(folder, "tuned", "candidate")
    return folder


@pytest.fixture
def settings(tiny_model: Path, adapter: Path, storage: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": tmp_path.name,
        "storage": str(storage),
        "model": {"path": str(tiny_model), "adapter": str(adapter)},
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as hub:
        # The process reads HF_ENDPOINT when it imports the library.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def export(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return run_export(ExportConfig.model_validate({**settings, **changes}))


def test_a_model_is_exported_and_registered(settings, storage, tmp_path):
    result = export(settings, tracking={"registered_model": "whole", "alias": "latest-export"})
    folder = Path(result["model"])
    assert folder == storage / tmp_path.name / "model"
    assert sv.attachment_of(sv.from_exported(folder)).config == SKIP
    assert result["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    registry = Registry(result["mlflow_uri"])
    assert registry.holder("whole", "latest-export") == result["model_version"].removeprefix("whole/")
    registry.fetch(registry.find("models:/whole@latest-export"), tmp_path / "fetched")
    assert sv.attachment_of(sv.from_exported(tmp_path / "fetched")).config == SKIP
    again = export(settings, tracking={"registered_model": "whole", "alias": "latest-export"})
    assert again == {**result, "already_finished": True}


def test_the_card_has_the_numbers_of_the_fine_tune(settings):
    card = (Path(export(settings)["model"]) / "README.md").read_text()
    assert "| exact_match.colour | 0.875 |" in card
    assert "| MLflow run | run0 |" in card
    assert "secret" not in card


def test_an_adapter_in_mlflow_brings_the_numbers_of_its_run(settings, storage):
    settings["model"]["adapter"] = "models:/tuned@candidate"
    result = export(settings)
    assert result["adapter"] == "models:/tuned/1"
    card = (Path(result["model"]) / "README.md").read_text()
    assert "| validation/exact_match/colour | 0.75 |" in card
    assert "| adapter | models:/tuned/1 |" in card
    assert "system/cpu" not in card
    run, metrics = Registry(result["mlflow_uri"]).metrics(ModelVersion("tuned", "1"))
    assert run in card
    assert metrics["loss"] == 0.5


def test_all_problems_are_reported_before_any_work(settings, hub, storage, tmp_path):
    settings["model"]["dtype"] = "bfloat16"
    (storage / "damaged").mkdir(exist_ok=True)
    (storage / "damaged" / "skip_config.json").write_text("{")
    settings["model"]["adapter"] = str(storage / "damaged")
    with pytest.raises(ConfigError) as refused:
        export(settings, hub={"repository": "grace/model"}, skip={"select": "views"})
    for text in ("cannot be read", "needs a multi-view family", "may write to ada, lovelace, not to 'grace'"):
        assert text in str(refused.value)
    assert not (storage / tmp_path.name / "run.json").exists()


def test_a_model_is_pushed_to_a_hub(settings, hub):
    result = export(settings, hub={"repository": "lovelace/shapes"})
    assert result["hub_address"] == f"{hub.address}/lovelace/shapes"
    assert hub.visibility == {"lovelace/shapes": "private"}
    folder = Path(result["model"])
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert hub.repositories["lovelace/shapes"].keys() - {".gitattributes"} == files
    for name in files:
        assert hub.repositories["lovelace/shapes"][name] == (folder / name).read_bytes()
    # A second job must not replace it silently.
    with pytest.raises(ConfigError, match="holds a model already"):
        export(settings, name="other", hub={"repository": "lovelace/shapes"})
    export(settings, name="other", hub={"repository": "lovelace/shapes", "overwrite": True})
    assert hub.commits == 2


def test_a_finished_export_is_pushed_later_without_work(settings, hub, monkeypatch):
    first = export(settings)

    def refuse(*_: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr("pipelines.export.job.write_export", refuse)
    second = export(settings, hub={"repository": "ada/shapes"})
    assert second["mlflow_run_id"] == first["mlflow_run_id"]
    assert "config.json" in hub.repositories["ada/shapes"]
    assert export(settings, hub={"repository": "ada/shapes"})["already_finished"]


def test_a_refused_push_is_repeated(settings, hub):
    hub.refuse_commits = True
    with pytest.raises(HubError, match="failed at pushing"):
        export(settings, hub={"repository": "ada/shapes"})
    hub.refuse_commits = False
    export(settings, hub={"repository": "ada/shapes"})
    assert "README.md" in hub.repositories["ada/shapes"]


def test_without_a_token_or_a_hub_no_work_is_started(settings, hub, storage, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="failed at checking ada/shapes"):
        export(settings, hub={"repository": "ada/shapes"})
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="there is no token"):
        export(settings, hub={"repository": "ada/shapes"})
    assert not (storage / tmp_path.name).exists()
