"""Mistakes are refused within seconds, before Ray is started, and leave no files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from pipelines.finetune import job as finetune
from pipelines.finetune.checks import check_model
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.job import run_finetune
from pipelines.tracking.client import TrackingError
from skipvision.errors import ConfigError, DataError, ResourceError
from skipvision.testing.configs import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def settings(tiny_model: Path, shapes_data: Path, tmp_path: Path, monkeypatch) -> dict[str, Any]:
    """A run that would begin if Ray could be started."""

    def started() -> None:
        raise AssertionError("Ray is started")

    monkeypatch.setattr(finetune, "ray_is_running", lambda: False)
    monkeypatch.setattr(finetune, "ray_session", started)
    return {
        "name": "run",
        "storage": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model)},
        "data": {"train": str(shapes_data / "train.json")},
    }


def with_bad_row(settings: dict[str, Any], tmp_path: Path) -> str:
    """The training file with one row whose image is missing."""
    source = Path(settings["data"]["train"])
    rows = json.loads(source.read_text())
    for row in rows:
        row["image"] = str(source.parent / row["image"])
    rows[3]["image"] = "gone.png"
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(rows))
    return str(file)


def test_a_correct_run_starts_ray(settings):
    with pytest.raises(AssertionError, match="Ray is started"):
        run_finetune(FinetuneConfig.model_validate(settings))


@pytest.mark.parametrize(
    ("section", "values", "error", "message"),
    [
        ("model", {"path": "./llava"}, ConfigError, r"model.path = ./llava: there is no"),
        ("model", {"path": "pipelines"}, ConfigError, r"model.path = .*pipelines: "),
        ("data", {"train": "nowhere.json"}, ConfigError, r"data.train = nowhere.json: there is no"),
        ("data", {"validation": "nowhere.json"}, ConfigError, r"data.validation = nowhere.json"),
        ("data", {"image_root": "/nowhere"}, ConfigError, r"data.image_root = /nowhere"),
        ("data", {"max_length": 1}, DataError, "40 × too long"),
        ("lora", {"target_modules": "("}, ConfigError, r"lora.target_modules = \(: "),
        ("skip", {"select": "ffn_ratio", "probe_layer": 7}, ConfigError, "probe_layer"),
        ("scaling", {"workers": 999}, ResourceError, "999 workers"),
        ("tracking", {"uri": "http://127.0.0.1:9"}, TrackingError, "starting the run"),
    ],
)
def test_a_wrong_setting_is_refused_without_ray(
    settings, section, values, error, message, monkeypatch, tmp_path
):
    monkeypatch.chdir(Path(__file__).parents[3])
    given = {**settings, section: {**settings.get(section, {}), **values}}
    with pytest.raises(error, match=message):
        run_finetune(FinetuneConfig.model_validate(given))
    left = {path.name for path in Path(settings["storage"]).rglob("*")}
    assert left <= {"run", "rejects.jsonl"} if error is DataError else not left


@pytest.mark.skipif(not hasattr(transformers, "Glm5NextConfig"), reason="the family does not exist")
def test_a_decoder_that_cannot_hide_skipped_tokens_is_refused_without_ray(settings, tiny_model, tmp_path):
    """Its attention makes its masks itself, which its config does not say but its layers do."""
    folder = shutil.copytree(tiny_model, tmp_path / "glm")
    tiny_config("glm5_next").save_pretrained(folder)
    lora = {"target_modules": r".*self_attn\.o_proj"}
    skip = {"retained": 0.3, "skipped": 0.3}
    given = {**settings, "model": {"path": str(folder)}, "lora": lora, "skip": skip}
    with pytest.raises(ConfigError, match="train with skip_kv=False, or with skipped=0"):
        run_finetune(FinetuneConfig.model_validate(given))
    given["skip"] = {**skip, "skip_kv": False}
    assert check_model(FinetuneConfig.model_validate(given)).parameters["trainable_parameters"] > 0


def test_bad_rows_stop_a_run_without_ray(settings, tmp_path):
    data = {"train": with_bad_row(settings, tmp_path), "on_bad_row": "stop"}
    with pytest.raises(DataError, match="1 of 40 rows cannot be used"):
        run_finetune(FinetuneConfig.model_validate({**settings, "data": data}))
    # The file that the message names stays.
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["rejects.jsonl"]


def test_the_resources_of_a_running_ray_are_checked_before_the_data_are_read(settings, monkeypatch):
    calls: list[str] = []

    def check(scaling: object) -> None:
        del scaling
        calls.append("workers")
        raise ResourceError("no room")

    monkeypatch.setattr(finetune, "check_workers", check)
    monkeypatch.setattr(finetune, "read_data", lambda *_: calls.append("data"))
    with pytest.raises(ResourceError, match="no room"):
        run_finetune(FinetuneConfig.model_validate(settings))
    assert calls == ["workers"]


def test_a_hub_that_does_not_answer_is_an_error_at_once(settings, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"model.path = owner/no-such-model: .* does not answer"):
        run_finetune(FinetuneConfig.model_validate({**settings, "model": {"path": "owner/no-such-model"}}))
    assert time.monotonic() - started < 20
