"""Relative paths lead where they can be found again, and a cluster is asked for no more than it has."""

from __future__ import annotations

import fcntl

import pytest

from pipelines.cluster.resources import fitting_workers, worker_resources
from pipelines.finetune.folder import FinetuneFolder, real_paths
from pipelines.shared.paths import input_path, model_path, output_path
from skipvision.errors import ConfigError, ResourceError

LAPTOP = [{"CPU": 2.0}]
CLUSTER = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 1.0}]


@pytest.fixture(autouse=True)
def _outside(monkeypatch):
    monkeypatch.delenv("SKIPVISION_HOME", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


# --------------------------------------------------------------------------------------------- paths


def test_relative_outputs_start_at_home_or_where_the_user_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert output_path("runs", "storage") == tmp_path / "runs"
    assert output_path("/x/runs", "storage").as_posix() == "/x/runs"
    monkeypatch.setenv("SKIPVISION_HOME", "/home/project")
    assert output_path("runs", "storage").as_posix() == "/home/project/runs"


def test_a_relative_output_inside_a_ray_job_is_refused_without_home(monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"storage = runs: .* throw-away copy .* absolute path"):
        output_path("runs", "storage")
    monkeypatch.setenv("SKIPVISION_HOME", "/home/project")
    assert output_path("runs", "storage").as_posix() == "/home/project/runs"


def test_an_output_is_a_folder_and_no_url():
    with pytest.raises(ConfigError, match="not a URL"):
        output_path("s3://bucket/runs", "storage")


def test_inputs_are_looked_for_at_home_and_then_here(monkeypatch, tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        (folder / "data").mkdir(parents=True)
    (here / "data" / "a.json").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("SKIPVISION_HOME", str(home))
    assert input_path("data/a.json", "data.train") == str(here / "data" / "a.json")
    (home / "data" / "a.json").touch()
    assert input_path("data/a.json", "data.train") == str(home / "data" / "a.json")
    assert input_path("data/*.json", "data.train") == str(home / "data" / "*.json")
    assert input_path("s3://bucket/a.json", "data.train") == "s3://bucket/a.json"
    with pytest.raises(ConfigError, match=r"data.train = data/b.json: there is no .*home.* nor .*here"):
        input_path("data/b.json", "data.train")


def test_a_model_is_a_folder_or_an_id_of_the_hub(monkeypatch, tmp_path):
    """What looks like a folder and is none must not be asked of the hub, which takes long to say no."""
    (tmp_path / "models" / "shapes-llava").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPVISION_HOME", str(tmp_path))
    assert model_path("models/shapes-llava", "model.path") == str(tmp_path / "models" / "shapes-llava")
    assert model_path("llava-hf/llava-1.5-7b-hf", "model.path") == "llava-hf/llava-1.5-7b-hf"
    assert model_path("gpt2", "model.path") == "gpt2"
    with pytest.raises(
        ConfigError, match=r"models/shape-llava: there is no .*; did you mean models/shapes-llava"
    ):
        model_path("models/shape-llava", "model.path")
    for path in ("./llava", "/nowhere/llava", "~/nowhere/llava", "a/b/c", "two words"):
        with pytest.raises(ConfigError, match=r"model.path = .*there is no"):
            model_path(path, "model.path")


# ------------------------------------------------------------------------------------------- workers


def test_no_worker_is_split_over_nodes():
    assert fitting_workers(CLUSTER, {"CPU": 8.0, "GPU": 0.0}) == 5
    assert fitting_workers(CLUSTER, {"CPU": 9.0}) == 2
    assert fitting_workers(CLUSTER, {"CPU": 1.0, "GPU": 1.0}) == 3


def test_cpus_are_shared_out_and_gpus_used_where_there_are_any():
    assert worker_resources(LAPTOP, 1, None, None) == {"CPU": 2.0, "GPU": 0.0}
    assert worker_resources(LAPTOP, 2, None, None) == {"CPU": 1.0, "GPU": 0.0}
    assert worker_resources(CLUSTER, 3, None, None) == {"CPU": 8.0, "GPU": 1.0}
    assert worker_resources(CLUSTER, 2, None, None) == {"CPU": 16.0, "GPU": 1.0}
    assert worker_resources(CLUSTER, 5, None, 0) == {"CPU": 8.0, "GPU": 0.0}
    assert worker_resources(CLUSTER, 2, 4, 1) == {"CPU": 4.0, "GPU": 1.0}


def test_more_than_there_is_is_refused():
    with pytest.raises(ResourceError, match=r"3 workers with 1 CPU and 0 GPU .* holds 2 \(its nodes: 2 CPU"):
        worker_resources(LAPTOP, 3, None, None)
    with pytest.raises(ResourceError, match="the cluster holds 0"):
        worker_resources(LAPTOP, 1, None, 1)
    with pytest.raises(ResourceError, match=r"4 workers with 1 CPU and 1 GPU .* holds 3"):
        worker_resources(CLUSTER, 4, None, None)


# ---------------------------------------------------------------------------------------- run folder


def begun_run(storage, config):
    run = FinetuneFolder(storage, "run")
    with run.claimed():
        assert not run.resumes(config)
        run.remember(config=config, mlflow_run_id="1")
    (run.checkpoints / "checkpoint_00000010").mkdir(parents=True)
    return FinetuneFolder(storage, "run")


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path):
    config = {"training": {"steps": 5, "rate": 1.0}, "scaling": {"workers": 1}, "storage": "runs"}
    run = begun_run(tmp_path, config)
    with run.claimed():
        elsewhere = {**config, "scaling": {"workers": 8}, "storage": str(tmp_path)}
        assert run.resumes(elsewhere)
        assert run.state["mlflow_run_id"] == "1"
        with pytest.raises(
            ConfigError, match=r"other settings:\n  training.rate: was 1.0, now 2.0\n  training.s"
        ):
            run.resumes({**config, "training": {"steps": 6, "rate": 2.0}})


def test_what_changes_no_result_may_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").touch()
    (tmp_path / "link.json").symlink_to("rows.json")
    config = {
        "data": {"train": "rows.json", "check_images": "decode"},
        "model": {"path": "owner/model"},
        "training": {
            "log_every": 1,
            "prefetch": 2,
            "checkpoint_every": 5,
            "keep_checkpoints": 2,
            "rate": 1.0,
        },
        "evaluation": {"every": 0, "batch_size": 2, "answer_rows": 5},
        "tracking": {"uri": None, "alias": "candidate", "registered_model": "a"},
    }
    run = begun_run(tmp_path, config)
    with run.claimed():
        run.remember(paths=real_paths(config))
        other = {
            "data": {"train": str(tmp_path / "link.json"), "check_images": "none"},
            "model": {"path": "owner/model"},
            "training": {
                "log_every": 9,
                "prefetch": 0,
                "checkpoint_every": 9,
                "keep_checkpoints": 1,
                "rate": 1.0,
            },
            "evaluation": {"every": 3, "batch_size": 1, "answer_rows": 5},
            "tracking": {"uri": "http://server", "alias": "champion", "registered_model": None},
        }
        assert run.resumes(other)
        assert run.changes == []
        with pytest.raises(ConfigError, match=r"evaluation.answer_rows: was 5, now 6\nSet"):
            run.resumes({**config, "evaluation": {**config["evaluation"], "answer_rows": 6}})
        (tmp_path / "others.json").touch()
        with pytest.raises(ConfigError, match=r"data\.train: was"):
            run.resumes({**config, "data": {**config["data"], "train": "others.json"}})


def test_an_unfinished_run_may_go_on_with_another_optimiser(tmp_path):
    """Or one whose gradients became infinite could never be finished."""
    config = {"training": {"learning_rate": 1.0, "precision": "bfloat16"}, "lora": {"rank": 1}}
    slower = {**config, "training": {"learning_rate": 0.1, "precision": "float32"}}
    run = begun_run(tmp_path, config)
    with run.claimed():
        with pytest.raises(ConfigError, match="resume_with_changes true"):
            run.resumes(slower)
        assert run.resumes(slower, with_changes=True)
        assert run.changes == [
            "training.learning_rate: was 1.0, now 0.1",
            'training.precision: was "bfloat16", now "float32"',
        ]
        with pytest.raises(ConfigError, match=r"lora\.rank"):
            run.resumes({**slower, "lora": {"rank": 2}}, with_changes=True)
        run.remember(trained={})
        with pytest.raises(ConfigError, match="learning_rate"):
            run.resumes(slower, with_changes=True)


def test_a_run_that_has_not_begun_may_be_started_anew(tmp_path):
    config = {"training": {"rate": 1.0}}
    run = begun_run(tmp_path, config)
    (run.checkpoints / "checkpoint_00000010").rmdir()
    with run.claimed():
        assert not run.resumes({"training": {"rate": 2.0}})
        assert run.state == {}


def test_a_folder_that_nothing_was_put_into_is_gone_again(tmp_path):
    storage = tmp_path / "new" / "runs"
    with FinetuneFolder(storage, "run").claimed():
        assert (storage / "run").is_dir()
    assert list(tmp_path.iterdir()) == []

    run = FinetuneFolder(storage, "run")
    with run.claimed():
        run.remember(config={})
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_a_claim_holds_although_the_job_before_took_its_lock_away(tmp_path):
    """Between opening and locking the file, its owner may have ended and removed it."""
    first, second = FinetuneFolder(tmp_path, "run"), FinetuneFolder(tmp_path, "run")
    real = fcntl.flock

    def end_first_job_meanwhile(file, operation):
        (tmp_path / "run" / "lock").unlink()
        fcntl.flock = real
        real(file, operation)

    fcntl.flock = end_first_job_meanwhile
    try:
        with first.claimed(), pytest.raises(ConfigError, match="worked on by another"), second.claimed():
            pass
    finally:
        fcntl.flock = real


def test_a_storage_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    claim = FinetuneFolder(tmp_path / "file", "run").claimed()
    with pytest.raises(ConfigError, match=r"storage = .*/file: cannot write to .*/file/run"), claim:
        pass
