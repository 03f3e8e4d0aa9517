"""Finished jobs, run again: the result is only reported for the inputs of the first start."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.calibrate import job as calibrate
from pipelines.calibrate.config import CalibrateConfig
from pipelines.calibrate.job import run_calibrate
from pipelines.score import job as score
from pipelines.score.config import ScoreConfig
from pipelines.score.dataset import read_dataset
from pipelines.score.fingerprints import of_files
from pipelines.score.job import run_score
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.registry import Registry
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError
from tests.pipelines.score.tables import PLAIN, png, table

JOBS: dict[str, tuple[Any, Any, Any]] = {
    "score": (score, run_score, ScoreConfig),
    "calibrate": (calibrate, run_calibrate, CalibrateConfig),
}


@pytest.fixture(scope="module")
def storage(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a registry of two versions of an adapter."""
    folder = tmp_path_factory.mktemp("storage")
    base = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float32)
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    adapter = sv.save_adapter(peft.get_peft_model(base, lora), folder / "adapter")
    uri = TrackingConfig().absolute_uri(folder)
    for number in "12":
        tracker = Tracker.start(uri, experiment="tests", run_name=number, artifacts=folder / "artifacts")
        tracker.register(adapter, "ours", "best")
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_a_finished_job_requires_the_inputs_of_its_first_start(job, storage, tiny_model, capsys, monkeypatch):
    module, run, kind = JOBS[job]
    monkeypatch.setattr(module, "ray_session", lambda: 1 / 0)
    rows = [{"index": n, "image": png(n), **PLAIN, "answer": "red"} for n in range(4)]
    file = table(storage / f"{job}.tsv", rows)
    model = {"path": str(tiny_model), "adapter": "models:/ours@best"}
    dataset = {"name": "mine", "path": str(file), "rule": "exact"}
    sections = {
        "score": {"systems": {"full": {"model": model}}, "datasets": [dataset]},
        "calibrate": {"model": model, "data": dataset},
    }
    config = kind.model_validate({"name": job, "storage": str(storage), **sections[job]})
    registry = Registry(TrackingConfig().absolute_uri(storage))
    registry._client.set_registered_model_alias("ours", "best", "1")
    base = SimpleNamespace(label=str(tiny_model), base=str(tiny_model))
    state = {
        "config": config.model_dump(mode="json"),
        "adapters": {"full": "models:/ours/1"},
        "adapter": "models:/ours/1",
        "files": of_files([read_dataset("mine", str(file), rule="exact")], [base]),
        "result": {"table": str(file), "chosen": {"retained": 4}},
    }
    for name in ("answers", "scores/one"):
        (storage / job / name).mkdir(parents=True)
    (storage / job / "run.json").write_text(json.dumps(state))

    assert run(config)["chosen"] == {"retained": 4}
    assert f"job {job!r} is finished already" in capsys.readouterr().out
    file.write_text(file.read_text().replace("\tred\n", "\tblue\n", 1))
    with pytest.raises(ConfigError, match=r"dataset mine has changed since this job began .* restore it"):
        run(config)
    table(file, rows)
    registry._client.set_registered_model_alias("ours", "best", "2")
    moved = r"models:/ours@best has changed since this job began \(models:/ours/1 then, models:/ours/2 now\)"
    with pytest.raises(ConfigError, match=moved):
        run(config)
    registry._client.set_registered_model_alias("ours", "best", "1")
    state["files"][f"base model {tiny_model}"] = "of another"
    (storage / job / "run.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"base model .* has changed since this job began"):
        run(config)
    assert json.loads((storage / job / "run.json").read_text()) == state
