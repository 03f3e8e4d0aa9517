"""Fine-tuning on a real local Ray: its results, and that crashes on the way do not change them.

The model, the data and the storage are in folders named like those of cloud drives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.folder import FinetuneFolder
from pipelines.finetune.job import run_finetune
from pipelines.tracking.client import TrackingError
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError, DataError, ResourceError, SkipVisionError
from tests.pipelines.odd_folders import CLOUD_DRIVE, copied

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).parents[3]
STEPS = 24


@pytest.fixture(scope="module")
def tiny_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tiny_model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shapes_data(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(shapes_data, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def settings(tiny_model: Path, shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 24 steps, a checkpoint every 6; one row is too long and one has no image."""
    storage = tmp_path_factory.mktemp("runs") / CLOUD_DRIVE
    rows = json.loads((shapes_data / "train.json").read_text())
    rows[3]["image"] = "images/gone.png"
    rows[5]["conversations"][1]["value"] = "very " * 200
    train = shapes_data / "train_with_bad_rows.json"
    train.write_text(json.dumps(rows))
    return {
        "name": "straight",
        "storage": str(storage),
        "model": {"path": str(tiny_model)},
        "data": {
            "train": str(train),
            "validation": str(shapes_data / "validation.json"),
            "max_length": 300,
        },
        "lora": {"rank": 4},
        "skip": {"retained": 0.25, "skipped": 0.25},
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 0.01,
            "precision": "float32",
            "checkpoint_every": 6,
            "log_every": 6,
        },
        "evaluation": {"every": 12, "answer_rows": 6, "max_new_tokens": 4},
        "tracking": {"experiment": "tests", "registered_model": "tiny", "system_metrics_seconds": 0.2},
        "scaling": {"cpus_per_worker": 1},
    }


def changed(settings: dict[str, Any], **sections: Any) -> FinetuneConfig:
    """The settings with some fields of some sections replaced."""
    merged = {
        name: {**settings[name], **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return FinetuneConfig.model_validate({**settings, **merged})


@pytest.fixture(scope="module")
def straight(settings: dict[str, Any], local_ray: None) -> dict[str, Any]:
    """The result of an undisturbed run."""
    return run_finetune(FinetuneConfig.model_validate(settings))


def folder_of(config: FinetuneConfig) -> FinetuneFolder:
    return FinetuneFolder(Path(config.storage), config.name)


def weights(adapter: str | Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(Path(adapter).glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(one: str | Path, other: str | Path, **tolerance: float) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], **tolerance)


def mlflow_client(result: dict[str, Any]):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=result["mlflow_uri"], registry_uri=result["mlflow_uri"])


def steps_of(result: dict[str, Any], metric: str = "loss") -> set[int]:
    return {m.step for m in mlflow_client(result).get_metric_history(result["mlflow_run_id"], metric)}


def assert_resumed(result: dict[str, Any]) -> None:
    """MLflow has every step, and those before the first checkpoint once: they were not repeated."""
    history = mlflow_client(result).get_metric_history(result["mlflow_run_id"], "loss")
    steps = [metric.step for metric in history]
    assert set(steps) == set(range(1, STEPS + 1))
    assert [steps.count(step) for step in range(1, 7)] == [1] * 6


def kill_after_first_checkpoint(run: FinetuneFolder, kill: Any) -> threading.Thread:
    """Call ``kill`` in the background as soon as the run has a complete checkpoint."""

    def watch() -> None:
        snapshot = run.checkpoints / "checkpoint_manager_snapshot.json"
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if snapshot.exists() and "checkpoint_0" in snapshot.read_text():
                kill()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def train_workers() -> list[psutil.Process]:
    """The train workers of this session's Ray only."""
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    children = psutil.Process(raylet).children()
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


# -------------------------------------------------------------------------------------------- results


def test_a_run_leaves_an_adapter_that_loads(straight, settings, tiny_model):
    assert straight["adapter"] == str(Path(settings["storage"]) / "straight" / "adapter")
    assert straight["steps"] == STEPS
    assert straight["rejected_rows"] == 2
    assert straight["seconds_per_step"] > 0
    assert set(straight["exact_match"]) == {
        "caption",
        "colour",
        "count",
        "number",
        "place",
        "shape",
        "overall",
    }
    model = sv.load_adapter(AutoModelForImageTextToText.from_pretrained(tiny_model), straight["adapter"])
    assert any("lora" in name for name, _ in model.named_parameters())
    assert any("skip_summary" in name for name, _ in model.named_parameters())


def test_mlflow_has_the_whole_run(straight):
    client = mlflow_client(straight)
    run = client.get_run(straight["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "straight"
    assert run.data.params["training.learning_rate"] == "0.01"
    assert run.data.params["skip.retained"] == "0.25"
    assert run.data.params["data_set.rows"] == "38"
    assert steps_of(straight) == set(range(1, STEPS + 1))
    for name in ("learning_rate", "grad_norm", "images_per_second", "tokens_per_second", "step_seconds"):
        assert run.data.metrics[name] >= 0
    assert run.data.metrics["peak_memory_bytes"] > 10 * 2**20
    measured, predicted = (run.data.metrics[f"activation_bytes{end}"] for end in ("", "_predicted"))
    assert (measured, predicted) == (straight["activation_bytes"], straight["activation_bytes_predicted"])
    assert predicted == pytest.approx(measured, rel=0.25)
    assert steps_of(straight, "validation/exact_match/overall") == {12, 24}
    assert steps_of(straight, "validation/loss") == {12, 24}
    assert run.data.metrics["rejected_rows"] == 2
    assert run.data.metrics["rejected_rows/missing image"] == 1
    assert any(name.startswith("system/") for name in run.data.metrics)
    files = {file.path for file in client.list_artifacts(straight["mlflow_run_id"])}
    assert files == {"adapter", "config.yaml", "rejects.jsonl"}
    version = client.get_model_version_by_alias("tiny", "candidate")
    assert version.run_id == straight["mlflow_run_id"]
    assert straight["model_version"] == f"tiny/{version.version}"


def test_rejected_rows_are_listed_with_their_reasons(straight, settings):
    lines = (Path(settings["storage"]) / "straight" / "rejects.jsonl").read_text().splitlines()
    rejects = {reject["key"]: reject for reject in map(json.loads, lines)}
    assert set(rejects) == {"train-000003", "train-000005"}
    assert "gone.png" in rejects["train-000003"]["reason"]
    assert "more than data.max_length = 300" in rejects["train-000005"]["reason"]


def test_only_the_newest_checkpoints_stay(straight, settings):
    kept = (Path(settings["storage"]) / "straight" / "checkpoints").glob("checkpoint_0*")
    assert sorted(path.name for path in kept) == ["checkpoint_00000018", "checkpoint_00000024"]


def test_a_finished_run_is_only_reported(straight, settings, capsys):
    started = time.monotonic()
    again = run_finetune(FinetuneConfig.model_validate(settings))
    assert again == {**straight, "already_finished": True}
    may_differ = changed(
        settings,
        data={"train": os.path.relpath(settings["data"]["train"])},
        training={"log_every": 1, "keep_checkpoints": 1},
    )
    assert run_finetune(may_differ) == again
    assert time.monotonic() - started < 2
    first, other = capsys.readouterr().out.splitlines()
    assert first == other == f"job 'straight' is finished already: {straight['adapter']}"


def test_the_same_name_with_other_settings_is_refused(straight, settings):
    config = changed(settings, training={"learning_rate": 0.5}, lora={"rank": 8}, scaling={"workers": 2})
    with pytest.raises(ConfigError) as error:
        run_finetune(config)
    assert "lora.rank: was 4, now 8" in str(error.value)
    assert "training.learning_rate: was 0.01, now 0.5" in str(error.value)
    assert "scaling" not in str(error.value)


# ------------------------------------------------------------------------------------ crashes and stops


@pytest.mark.slow
def test_a_killed_worker_and_an_absent_registry_change_nothing(straight, settings, monkeypatch):
    """SIGKILL during the run and no MLflow at the end: the run resumes, and only registers again."""
    config = changed(settings, name="worker-killed")
    killed: list[int] = []

    def kill() -> None:
        for worker in train_workers():
            killed.append(worker.pid)
            worker.send_signal(signal.SIGKILL)

    def fail(*_: Any) -> str:
        raise TrackingError("MLflow is away")

    watcher = kill_after_first_checkpoint(folder_of(config), kill)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "register", fail)
        with pytest.raises(
            TrackingError, match=r"adapter is safe in .*worker-killed/adapter. Run the same job"
        ):
            run_finetune(config)
    watcher.join()
    assert killed
    assert_same_weights(straight["adapter"], folder_of(config).adapter)

    monkeypatch.setattr("pipelines.finetune.job._train", fail)  # nothing may be trained again
    result = run_finetune(config)
    assert result["model_version"].startswith("tiny/")
    assert_resumed(result)
    assert result["loss"] == straight["loss"]

    elsewhere = {"experiment": "elsewhere", "registered_model": None}
    moved = run_finetune(changed(settings, name="worker-killed", tracking=elsewhere))
    client = mlflow_client(moved)
    run = client.get_run(moved["mlflow_run_id"])
    assert moved["mlflow_run_id"] != result["mlflow_run_id"]
    assert client.get_experiment(run.info.experiment_id).name == "elsewhere"
    assert run.data.metrics["loss"] == pytest.approx(straight["loss"])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"adapter", "config.yaml"}


@pytest.mark.slow
def test_a_killed_job_is_resumed_by_the_next(straight, settings, local_ray):
    """The job's process is killed; the same job, here on two workers, continues run and MLflow record."""
    config = changed(settings, name="job-killed")
    address = ray.get_runtime_context().gcs_address
    code = (
        "import sys, ray\n"
        "from pipelines.finetune.config import FinetuneConfig\n"
        "from pipelines.finetune.job import run_finetune\n"
        "ray.init(address=sys.argv[1], runtime_env={'env_vars': {'PYTHONPATH': sys.argv[2]}})\n"
        "run_finetune(FinetuneConfig.model_validate_json(sys.argv[3]))"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, address, str(ROOT), config.model_dump_json()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    kill_after_first_checkpoint(folder_of(config), job.kill).join()
    assert job.wait(60) == -signal.SIGKILL
    state = json.loads((folder_of(config).path / "run.json").read_text())
    assert "trained" not in state

    result = run_finetune(changed(settings, name="job-killed", scaling={"workers": 2}))
    assert result["mlflow_run_id"] == state["mlflow_run_id"]
    assert_resumed(result)
    assert_same_weights(straight["adapter"], result["adapter"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # a job without a training is stopped in test_local
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_cleans_up(settings, tmp_path, number):
    """Its MLflow run is KILLED, and no stack of Ray's C++ is printed."""
    config = changed(settings, name=f"stopped-{number}", training={"max_steps": 2000, "checkpoint_every": 2})
    file = tmp_path / "settings.yaml"
    file.write_text(config.model_dump_json())
    job = subprocess.Popen(
        [sys.executable, "jobs/finetune.py", "--config", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    kill_after_first_checkpoint(folder_of(config), lambda: job.send_signal(number)).join()
    output, errors = job.communicate(timeout=120)
    assert job.returncode == 128 + number, output + errors
    assert "Traceback" not in errors
    assert "    @ " not in errors + output
    folder = folder_of(config)
    state = json.loads((folder.path / "run.json").read_text())
    client = mlflow_client({"mlflow_uri": config.tracking.absolute_uri(folder.storage)})
    assert client.get_run(state["mlflow_run_id"]).info.status == "KILLED"


@pytest.mark.slow
def test_two_workers_train_the_same_adapter_as_one(straight, settings):
    """The same global batches, halved: the same adapter, up to the order of additions."""
    result = run_finetune(changed(settings, name="two-workers", scaling={"workers": 2}))
    assert_same_weights(straight["adapter"], result["adapter"], rtol=1e-3, atol=1e-4)
    assert result["validation_loss"] == pytest.approx(straight["validation_loss"], rel=1e-4)
    assert result["exact_match"] == straight["exact_match"]


@pytest.mark.slow
def test_a_distilled_run_survives_a_crash_and_does_not_depend_on_its_workers(settings, local_ray):
    """Its metrics and its result have both losses, and the FLOPs that the teacher adds."""
    settings = {**settings, "distillation": {"top_k": 8, "temperature": 2.0}}
    one = changed(settings, name="distilled", training={"objective": "both"})
    result = run_finetune(one)
    other = changed(settings, name="distilled-2", training={"objective": "both"}, scaling={"workers": 2})
    killed: list[int] = []

    def kill() -> None:
        worker = train_workers()[0]
        killed.append(worker.pid)
        worker.send_signal(signal.SIGKILL)

    watcher = kill_after_first_checkpoint(folder_of(other), kill)
    crashed = run_finetune(other)
    watcher.join()
    assert killed
    assert_resumed(crashed)
    assert_same_weights(result["adapter"], crashed["adapter"], rtol=1e-3, atol=1e-4)
    for name in ("loss", "answers_loss", "distill_loss", "validation_loss", "validation_distill_loss"):
        assert crashed[name] == pytest.approx(result[name], rel=1e-3), name
    assert result["loss"] == pytest.approx((result["answers_loss"] + result["distill_loss"]) / 2)
    flops = result["flops_per_row"]
    assert flops["teacher"] == pytest.approx(flops["teacher_predicted"], rel=0.02)
    assert flops["student"] == pytest.approx(flops["student_predicted"], rel=0.02)
    metrics = mlflow_client(result).get_run(result["mlflow_run_id"]).data.metrics
    assert metrics["flops_per_row/teacher"] == flops["teacher"]
    for name in ("answers_loss", "distill_loss"):
        assert steps_of(result, name) == set(range(1, STEPS + 1))
        assert metrics[name] == pytest.approx(result[name])
    assert metrics["validation/distill_loss"] == pytest.approx(result["validation_distill_loss"])


# ------------------------------------------------------------------------- rows that become unusable


@pytest.fixture(scope="module")
def damaged(settings: dict[str, Any], shapes_data: Path) -> dict[str, Any]:
    """Two training rows and a validation row with bad images, checked only when they are needed."""
    data = {}
    for split, changes in {
        "train": {3: "images/gone.png", 5: "damaged.png"},
        "validation": {0: "damaged.png"},
    }.items():
        rows = json.loads((shapes_data / f"{split}.json").read_text())
        for number, image in changes.items():
            rows[number]["image"] = image
        data[split] = str(shapes_data / f"{split}_damaged.json")
        Path(data[split]).write_text(json.dumps(rows))
    (shapes_data / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return {**data, "check_images": "none"}


@pytest.mark.slow
def test_rows_that_become_unusable_are_skipped_listed_and_counted(settings, damaged, local_ray):
    """On two workers over more than two epochs: each such row is listed once."""
    result = run_finetune(changed(settings, name="damaged", data=damaged, scaling={"workers": 2}))
    folder = Path(settings["storage"]) / "damaged"
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert sorted((Path(r["source"]).name, r["key"], r["kind"], r["data_sets"]) for r in rejects) == [
        ("train_damaged.json: row 4", "train-000003", "missing image", ["train"]),
        ("train_damaged.json: row 6", "train-000005", "unreadable image", ["train"]),
        ("validation_damaged.json: row 1", "validation-000000-caption", "unreadable image", ["validation"]),
    ]
    assert result["rejected_rows"] == 3
    assert result["steps"] == STEPS
    run = mlflow_client(result).get_run(result["mlflow_run_id"])
    assert run.data.metrics["rejected_rows"] == 3
    assert run.data.metrics["rejected_rows/unreadable image"] == 2
    history = mlflow_client(result).get_metric_history(result["mlflow_run_id"], "rejected_rows")
    assert {m.step: m.value for m in history}[0] == 0
    stored = mlflow_client(result).download_artifacts(result["mlflow_run_id"], "rejects.jsonl")
    assert Path(stored).read_text() == (folder / "rejects.jsonl").read_text()


@pytest.mark.slow
def test_rows_that_become_unusable_stop_the_run_if_so_configured(settings, damaged, local_ray, capfd):
    """At once, because they would at every restart; the adapter of the last step is safe."""
    data = {**damaged, "train": str(Path(damaged["train"]).with_name("train.json")), "on_bad_row": "stop"}
    config = changed(settings, name="damaged-strict", data=data, training={"max_steps": 6})
    with pytest.raises(DataError, match=r"validation-000000-caption\) became unusable .*damaged.png"):
        run_finetune(config)
    output, errors = capfd.readouterr()
    assert output.count("training begins: 6 steps") == 1
    assert "Traceback" not in output + errors
    folder = folder_of(config)
    assert weights(folder.adapter)
    assert len(folder.rejects.read_text().splitlines()) == 1
    state = json.loads((folder.path / "run.json").read_text())
    uri = config.tracking.absolute_uri(folder.storage)
    run = mlflow_client({"mlflow_uri": uri}).get_run(state["mlflow_run_id"])
    assert run.info.status == "FAILED"
    assert run.data.metrics["rejected_rows"] == 1

    # With settings that may differ or change, the run resumes from its checkpoint.
    training = {**settings["training"], "max_steps": 6, "learning_rate": 0.001}
    tolerant = changed(
        settings, name="damaged-strict", data={**data, "on_bad_row": "skip"}, training=training
    )
    with pytest.raises(
        ConfigError, match=r"learning_rate: was 0.01, now 0.001\nRestore .*resume_with_changes true"
    ):
        run_finetune(tolerant)
    result = run_finetune(tolerant.model_copy(update={"resume_with_changes": True}))
    assert result["steps"] == 6
    run = mlflow_client(result).get_run(state["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["resumed_with_changes"] == "training.learning_rate: was 0.01, now 0.001"


@pytest.mark.slow
def test_an_error_that_would_recur_is_not_retried(settings, local_ray, capfd):
    config = changed(settings, name="exploding", training={"learning_rate": 1e30, "max_steps": 6})
    with pytest.raises(SkipVisionError, match=r"the gradient at step . is (nan|inf): lower"):
        run_finetune(config)
    assert capfd.readouterr().out.count("training begins: 6 steps") == 1


@pytest.mark.slow
def test_a_run_ends_when_the_storage_of_images_is_gone(settings, damaged, local_ray, shapes_data):
    """Otherwise all steps would pass without a row, and an untrained adapter would be registered."""
    rows = json.loads((shapes_data / "train.json").read_text())
    for row in rows:
        row["image"] = "unmounted/" + row["image"]
    file = shapes_data / "train_unmounted.json"
    file.write_text(json.dumps(rows))
    data = {**damaged, "train": str(file)}
    with pytest.raises(DataError, match=r"no row of the last 3 steps \(to step 3\) could be used"):
        run_finetune(changed(settings, name="unmounted", data=data))


# ----------------------------------------------------------------------------------- refused beforehand


def test_more_workers_than_the_cluster_has_are_refused(settings, local_ray):
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"9 workers with 1 CPU .* the cluster holds 4"):
        run_finetune(changed(settings, name="greedy", scaling={"workers": 9}))
    assert time.monotonic() - started < 10


def test_a_file_without_usable_rows_is_an_error_at_once(settings, local_ray, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps([{"id": "a", "image": "no.png", "conversations": []}]))
    with pytest.raises(DataError, match="no usable row"):
        run_finetune(changed(settings, name="empty", data={"train": str(file)}))
    # No work was done under that name, so it can be used with other settings.
    with pytest.raises(DataError, match="1 × conversation"):
        run_finetune(changed(settings, name="empty", data={"train": str(file)}, lora={"rank": 2}))


def test_bad_rows_stop_the_run_if_so_configured(settings, local_ray):
    with pytest.raises(DataError, match="2 of 40 rows cannot be used"):
        run_finetune(changed(settings, name="strict", data={"on_bad_row": "stop"}))


def test_a_run_that_another_process_works_on_is_refused(settings):
    config = changed(settings, name="busy")
    with folder_of(config).claimed(), pytest.raises(ConfigError, match="in use by another process"):
        run_finetune(config)
