"""A job's folder: one process at a time, resumed only with the settings it was started with."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.folder import FinetuneFolder
from pipelines.shared.folder import JobFolder
from skipvision.errors import ConfigError


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a fine-tuning run whose training rows are a file in the working directory."""
    monkeypatch.delenv("SKIPVISION_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").touch()
    return {
        "name": "run",
        "storage": "runs",
        "model": {"path": "owner/model"},
        "data": {"train": "rows.json"},
        "training": {"max_steps": 5, "learning_rate": 1.0, "precision": "bfloat16"},
    }


def changed(given: dict[str, Any], **sections: Any) -> FinetuneConfig:
    merged = {
        name: {**given.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return FinetuneConfig.model_validate({**given, **merged})


@pytest.fixture
def run(given: dict[str, Any], tmp_path: Path) -> FinetuneFolder:
    """The folder of a run that has a checkpoint."""
    run = FinetuneFolder(tmp_path, "run")
    with run.claimed():
        assert not run.resume(changed(given))
        run.remember_settings(changed(given), mlflow_run_id="1")
    (run.checkpoints / "checkpoint_00000010").mkdir(parents=True)
    return FinetuneFolder(tmp_path, "run")


def test_a_run_is_resumed_with_its_own_settings_only(given, run, tmp_path):
    with run.claimed():
        assert run.resume(changed(given, scaling={"workers": 8}, storage=str(tmp_path)))
        assert run.state["mlflow_run_id"] == "1"
        with pytest.raises(
            ConfigError,
            match=r"settings:\n  training.batch_size: was 16, now 4\n  training.max_steps: was 5, now 6",
        ):
            run.resume(changed(given, training={"max_steps": 6, "batch_size": 4}))


def test_settings_that_change_no_result_may_differ(given, run, tmp_path):
    (tmp_path / "link.json").symlink_to("rows.json")
    other = changed(
        given,
        data={"train": str(tmp_path / "link.json"), "check_images": "none"},
        training={"log_every": 9, "prefetch": 0, "checkpoint_every": 9, "keep_checkpoints": 1},
        evaluation={"every": 3, "batch_size": 1},
        tracking={"uri": "http://server", "alias": "champion", "registered_model": None},
    )
    with run.claimed():
        assert run.resume(other)
        assert run.changes == []
        with pytest.raises(ConfigError, match=r"evaluation.answer_rows: was 240, now 6\nRestore"):
            run.resume(changed(given, evaluation={"answer_rows": 6}))
        (tmp_path / "others.json").touch()
        with pytest.raises(ConfigError, match=r"data\.train: was"):
            run.resume(changed(given, data={"train": "others.json"}))


def test_an_unfinished_run_may_be_resumed_with_another_optimiser(given, run):
    """A run whose gradients became infinite could never be finished otherwise."""
    slower = changed(given, training={"learning_rate": 0.1, "precision": "float32"})
    with run.claimed():
        with pytest.raises(ConfigError, match="resume_with_changes true"):
            run.resume(slower)
        assert run.resume(slower, with_changes=True)
        assert run.changes == [
            "training.learning_rate: was 1.0, now 0.1",
            'training.precision: was "bfloat16", now "float32"',
        ]
        with pytest.raises(ConfigError, match=r"lora\.rank"):
            run.resume(changed(given, lora={"rank": 2}), with_changes=True)
        run.remember(trained={})
        with pytest.raises(ConfigError, match="learning_rate"):
            run.resume(slower, with_changes=True)


def test_a_run_without_work_may_be_started_with_other_settings(given, run):
    (run.checkpoints / "checkpoint_00000010").rmdir()
    with run.claimed():
        assert not run.resume(changed(given, training={"learning_rate": 2.0}))
        assert run.state == {}


def test_an_empty_folder_is_removed(tmp_path):
    storage = tmp_path / "new" / "runs"
    with JobFolder(storage, "run").claimed():
        assert (storage / "run").is_dir()
    assert list(tmp_path.iterdir()) == []

    run = JobFolder(storage, "run")
    with run.claimed():
        run.remember(result={})
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_a_claim_holds_although_the_previous_job_removed_its_lock(tmp_path):
    """The previous owner may end and remove the file between our opening and our locking it."""
    first, second = JobFolder(tmp_path, "run"), JobFolder(tmp_path, "run")
    real = fcntl.flock

    def end_first_job_meanwhile(file, operation):
        (tmp_path / "run" / "lock").unlink()
        fcntl.flock = real
        real(file, operation)

    fcntl.flock = end_first_job_meanwhile
    try:
        with first.claimed(), pytest.raises(ConfigError, match="in use by another process"), second.claimed():
            pass
    finally:
        fcntl.flock = real


def test_a_storage_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    claim = JobFolder(tmp_path / "file", "run").claimed()
    with pytest.raises(ConfigError, match=r"storage = .*/file: cannot write to .*/file/run"), claim:
        pass


def test_a_run_of_an_earlier_version_keeps_its_mlflow_run(run):
    """``run.json`` did not say where a fine-tuning run was recorded."""
    with run.claimed():
        assert "tracked_in" in run.state
        assert run.state["tracked_in"] == run.state["config"]["tracking"]


def test_fields_that_an_earlier_version_did_not_have_had_their_defaults(given, run):
    with run.claimed():
        earlier = {name: value for name, value in run.state["config"].items() if name != "distillation"}
        earlier["training"] = {k: v for k, v in earlier["training"].items() if k != "objective"}
        run.remember(config=earlier)
        assert run.resume(changed(given))
        with pytest.raises(ConfigError, match=r"\n  training.objective: was \"answers\", now \"both\""):
            run.resume(changed(given, training={"objective": "both"}))
        run.remember(config={**earlier, "skip": None})
        with pytest.raises(ConfigError, match=r"\n  skip: was null, now \(not set\)"):
            run.resume(changed(given))
