"""Every job keeps the same promises: a table of jobs and of what may happen to them.

A job is a real process or a call of its entry point, with a tiny model, a real local Ray and a real MLflow
store. Cells that start processes or train are `slow`; every job and every scenario also has quick cells.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import ray
import torch
from transformers import AutoModelForImageTextToText

import skipvision as sv
from pipelines.shared.config import run_job
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.registry import Registry
from pipelines.tracking.run import Tracker
from tests.pipelines.score.tables import PLAIN, png, table
from tests.pipelines.spine_jobs import JOBS, NOT_APPLICABLE, SKIP, Inputs
from tests.pipelines.tracking.test_run import no_metrics

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MLflow at .* does not take metrics"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).parents[2]
AWAY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def originals(tiny_model: Path, shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    sv.attach(model, sv.SkipConfig(**SKIP))
    adapter = sv.save_adapter(model, folder / "adapter")
    sv.attachment_of(model).detach()
    sv.save_adapter(model, folder / "full_adapter")
    table(
        folder / "questions.tsv", [{"index": n, "image": png(n), **PLAIN, "answer": "red"} for n in range(8)]
    )
    storage = tmp_path_factory.mktemp("runs")
    # MLflow takes seconds to create its tables: all tests share one store.
    Tracker.start(
        TrackingConfig().absolute_uri(storage),
        experiment="spine",
        run_name="first",
        artifacts=storage / "mlflow-artifacts",
    ).register(adapter, "ours", "candidate")
    return Inputs(folder, tiny_model, shapes_data, adapter, storage)


@pytest.fixture
def inputs(originals: Inputs, tmp_path: Path) -> Inputs:
    """A copy of the files that tests change."""
    folder = tmp_path / "inputs"
    shutil.copytree(originals.folder, folder)
    data = tmp_path / "data"
    shutil.copytree(originals.data, data)
    return Inputs(folder, originals.model, data, folder / "adapter", originals.storage)


def cells(scenario: str) -> Any:
    """Parametrise over the jobs that a scenario applies to."""
    names = [name for name in JOBS if (scenario, name) not in NOT_APPLICABLE]
    marks = {name: [pytest.mark.slow] if scenario in JOBS[name].slow else [] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@pytest.fixture
def write(inputs: Inputs, tmp_path: Path) -> Callable[..., list[str]]:
    """Write a job's YAML file; returns the command line that reads it."""

    def write(name: str, **changes: Any) -> list[str]:
        settings = JOBS[name].settings(inputs)
        tracking = {**settings.get("tracking", {}), "experiment": "spine", **changes.pop("tracking", {})}
        settings |= {"storage": str(inputs.storage), **changes}
        if name not in ("compare", "tradeoff"):
            settings["tracking"] = tracking
        if name not in ("compare", "promote"):
            settings["name"] = f"{name}-{tmp_path.name}"
        if name == "compare" and "uri" in tracking:
            file = inputs.storage / settings["full"] / "run.json"
            file.write_text(file.read_text().replace(inputs.uri, tracking["uri"]))
        file = tmp_path / "settings.yaml"
        file.write_text(json.dumps(settings))
        return ["--config", str(file)]

    return write


def folder_of(argv: list[str]) -> Path:
    settings = json.loads(Path(argv[1]).read_text())
    name = settings.get("name") or f"{settings.get('skip')}-against-{settings.get('full')}"
    return Path(settings["storage"]) / name


def run(name: str, argv: list[str], capsys: Any) -> dict[str, Any]:
    """Run a job as its file does, in this process; returns the line of results."""
    capsys.readouterr()
    run_job(importlib.import_module(f"jobs.{name}").main, argv)
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def refused(name: str, argv: list[str], capsys: Any) -> tuple[int, str]:
    """Run a job that ends with an error; returns its exit status and message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_job(importlib.import_module(f"jobs.{name}").main, argv)
    return int(end.value.code or 0), capsys.readouterr().err


# A job that sends itself a signal in the middle, at a file or at a call.
ITSELF = """
import importlib, os, sys, threading, time
from pathlib import Path

name, number, midway, folder, address, *argv = sys.argv[1:]

def strike():
    os.kill(os.getpid(), int(number))

def watch():
    while not list(Path(folder).glob(midway)):
        time.sleep(0.01)
    strike()

if address:
    import ray
    ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}})
from pipelines.shared.config import run_job
main = importlib.import_module(f"jobs.{name}").main
if ":" in midway:
    module, function = midway.split(":")
    module = importlib.import_module(module)
    original = getattr(module, function)
    def struck(*arguments, **named):
        strike()
        return original(*arguments, **named)
    setattr(module, function, struck)
else:
    threading.Thread(target=watch, daemon=True).start()
run_job(main, argv)
"""


def struck(name: str, argv: list[str], number: int) -> subprocess.CompletedProcess[str]:
    """Run a job in a process of its own that gets a signal in the middle."""
    midway, address = JOBS[name].midway, ""
    if ":" not in midway:
        address = ray.get_runtime_context().gcs_address
    return subprocess.run(
        [sys.executable, "-c", ITSELF, name, str(int(number)), midway, str(folder_of(argv)), address, *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def runs_of(uri: str, argv: list[str]) -> dict[str, str]:
    """The ids and states of a job's runs in MLflow."""
    file = folder_of(argv) / "run.json"
    state = json.loads(file.read_text()) if file.exists() else {"mlflow_run_ids": {}}
    if settings := compared(argv):
        runs = [json.loads((folder_of(argv).parent / name / "run.json").read_text()) for name in settings]
        state = {
            "mlflow_run_ids": {run["result"]["mlflow_run_id"]: run["result"]["mlflow_run_id"] for run in runs}
        }
    ids = [state["mlflow_run_id"]] if "mlflow_run_id" in state else state["mlflow_run_ids"].values()
    client = Tracker(uri, "")._client
    return {run_id: client.get_run(run_id).info.status for run_id in ids}


def compared(argv: list[str]) -> list[str]:
    """The names of the runs that the job compares, if it does."""
    settings = json.loads(Path(argv[1]).read_text())
    return [settings["full"], settings["skip"]] if "full" in settings else []


def newest_run(uri: str) -> tuple[str, str]:
    client = Tracker(uri, "")._client
    experiment = client.get_experiment_by_name("spine").experiment_id
    (run,) = client.search_runs([experiment], max_results=1)
    return run.info.run_id, run.info.status


@pytest.fixture
def ray_if_needed(request: pytest.FixtureRequest) -> None:
    """The session's Ray, for jobs that use one."""
    name = request.getfixturevalue("name")
    if name not in ("promote", "analyse", "compare", "export"):
        request.getfixturevalue("local_ray")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not be started, and no model loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was started")

    for name in ("finetune", "caption", "score", "calibrate", "tradeoff"):
        monkeypatch.setattr(f"pipelines.{name}.job.ray_session", refuse)
    monkeypatch.setattr("pipelines.finetune.job.ray_is_running", lambda: False)
    monkeypatch.setattr("pipelines.analyse.job._measure", refuse)
    monkeypatch.setattr("pipelines.compare.job._answers", refuse)
    monkeypatch.setattr("pipelines.export.job._write", refuse)


# ----------------------------------------------------------------------------------------- the scenarios


def test_every_job_is_in_the_table():
    """Or is no such job: it has no folder and records nothing."""
    others = {"make_shapes", "train_base", "demo", "deploy"}
    assert {file.stem for file in (ROOT / "jobs").glob("*.py")} == JOBS.keys() | others


@cells("wrong")
def test_all_wrong_settings_are_reported_before_any_work(name, write, no_ray, capsys):
    argv = write(name, nonsense=1, storage=["a", "list"])
    status, message = refused(name, argv, capsys)
    assert status == 2
    assert "2 problems" in message
    assert "nonsense = 1: " in message
    assert "storage = " in message


@cells("path")
def test_a_path_that_leads_nowhere_is_reported_before_any_work(name, write, inputs, no_ray, capsys):
    argv = write(name)
    shutil.rmtree(inputs.folder)
    shutil.rmtree(inputs.data)
    status, message = refused(name, argv, capsys)
    assert status == 2
    assert "there is no" in message
    assert not (folder_of(argv) / "run.json").exists()


@cells("address")
def test_an_address_that_is_not_of_a_ray_is_reported_before_any_work(
    name, write, no_ray, monkeypatch, capsys
):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    argv = write(name)
    status, message = refused(name, argv, capsys)
    assert status == 2
    assert "RAY_ADDRESS = http://127.0.0.1:8265: this is the address of Ray's dashboard" in message
    assert not (folder_of(argv) / "run.json").exists()
    assert not (folder_of(argv) / "manifest").exists()


@cells("away")
def test_without_mlflow_no_work_is_started(name, write, no_ray, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # with them it takes 5 to 20 s
    status, message = refused(name, write(name, tracking={"uri": AWAY}), capsys)
    assert status == 1
    assert "MLflow failed at" in message
    assert AWAY in message


@cells("stop")
@pytest.mark.usefixtures("ray_if_needed")
def test_a_stopped_job_is_killed_in_mlflow_and_finished_by_the_next(name, write, inputs, capsys):
    argv = write(name)
    stopped = struck(name, argv, signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stdout + stopped.stderr
    own = [
        line for line in stopped.stderr.splitlines() if " pid=" not in line
    ]  # without those of Ray's actors
    assert "Traceback" not in "\n".join(own)
    if name == "promote":
        assert newest_run(inputs.uri)[1] == "KILLED"
        assert run(name, argv, capsys)["outcome"] == "promoted"
        without_alias(inputs)
        return
    before = runs_of(inputs.uri, argv)
    assert set(before.values()) == JOBS[name].ends[0]
    assert not run(name, argv, capsys).get("already_finished")
    assert runs_of(inputs.uri, argv) == dict.fromkeys(before, "FINISHED")


@cells("kill")
@pytest.mark.usefixtures("ray_if_needed")
def test_a_job_that_was_killed_is_finished_by_the_next(name, write, inputs, capsys):
    argv = write(name)
    killed = struck(name, argv, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    if name == "promote":
        assert newest_run(inputs.uri)[1] == "RUNNING"  # nobody is left to end it
        assert run(name, argv, capsys)["outcome"] == "promoted"
        without_alias(inputs)
        return
    before = runs_of(inputs.uri, argv)
    assert set(before.values()) == JOBS[name].ends[1]
    run(name, argv, capsys)
    assert runs_of(inputs.uri, argv) == dict.fromkeys(before, "FINISHED")


@cells("finished")
@pytest.mark.usefixtures("ray_if_needed")
def test_a_finished_job_only_reports(name, write, capsys, request):
    argv = write(name)
    first = run(name, argv, capsys)
    request.getfixturevalue("no_ray")
    run_job(importlib.import_module(f"jobs.{name}").main, argv)
    *lines, last = capsys.readouterr().out.splitlines()
    assert f"job {folder_of(argv).name!r} is finished already: " in "\n".join(lines)
    assert {**json.loads(last), "seconds": 0} == {**first, "seconds": 0, "already_finished": True}


@cells("tracking")
@pytest.mark.usefixtures("ray_if_needed")
def test_with_other_tracking_settings_a_job_is_recorded_again_without_work(
    name, write, inputs, capsys, request
):
    """And MLflow, which at first does not take the numbers, gets them in the end."""
    argv = write(name)
    run(name, argv, capsys)
    before = runs_of(inputs.uri, argv)
    request.getfixturevalue("no_ray")
    argv = write(name, tracking={"experiment": "elsewhere"})
    with no_metrics(inputs.uri):
        status, message = refused(name, argv, capsys)
    assert status == 1
    assert "did not take" in message
    assert "Run the same job again" in message
    failed = runs_of(inputs.uri, argv)
    assert set(failed.values()) == {"FAILED"}
    assert not failed.keys() & before.keys()
    run(name, argv, capsys)
    assert runs_of(inputs.uri, argv) == dict.fromkeys(failed, "FINISHED")
    client = Tracker(inputs.uri, "")._client
    for run_id in failed:
        experiment = client.get_run(run_id).info.experiment_id
        assert client.get_experiment(experiment).name == "elsewhere"
    assert {client.get_run(one).info.status for one in before} == {"FINISHED"}


@cells("data")
def test_changed_data_are_refused_by_the_name_of_the_file(name, write, inputs, no_ray, capsys):
    argv = write(name)
    with pytest.raises(AssertionError, match="work was started"):
        run_job(importlib.import_module(f"jobs.{name}").main, argv)
    JOBS[name].work(folder_of(argv))
    before = json.loads((folder_of(argv) / "run.json").read_text())
    changed = JOBS[name].data(inputs)
    status, message = refused(name, argv, capsys)
    assert status in (1, 2)
    assert changed in message
    assert json.loads((folder_of(argv) / "run.json").read_text()) == before


def without_alias(inputs: Inputs) -> None:
    Registry(inputs.uri)._client.delete_registered_model_alias("ours", "spine")
