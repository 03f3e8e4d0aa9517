"""Captioning on a real local Ray: every key occurs once, errors are rows, and deaths change no result.

The model, the adapter, the images and the storage are in folders named like those of cloud drives. With
``TEST_BACKEND=vllm`` vLLM generates the captions.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import peft
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from pipelines.caption.config import CaptionConfig
from pipelines.caption.folder import CaptionFolder
from pipelines.caption.job import run_caption
from pipelines.tracking.client import TrackingError, connect
from pipelines.tracking.run import Tracker
from skipvision.engine import Engine, Request, Sampling
from skipvision.errors import ConfigError, DataError, ResourceError
from tests.backend import ENGINE, ON_VLLM, on_vllm
from tests.conftest import PYTHONPATH
from tests.pipelines.odd_folders import CLOUD_DRIVE, copied

SECONDS = 900 if ON_VLLM else 300
"""How long a test may take."""
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.timeout(SECONDS),
]
ROOT = Path(__file__).parents[3]
ROWS = 40
SKIPPED = 0 if ON_VLLM else 4
BAD = {
    "missing": "missing image",
    "corrupt": "unreadable image",
    "truncated": "unreadable image",
    "text": "unreadable image",
    "bomb": "oversized image",
    "too-long": "prompt",
    "row-3#2": "duplicate key",
}


@pytest.fixture(scope="module")
def tiny_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tiny_model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, with a config of its own."""
    torch.manual_seed(1)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model)
    lora = peft.LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|up_proj)", init_lora_weights=False
    )
    model = peft.get_peft_model(base, lora)
    sv.attach(model, sv.SkipConfig(retained=4, skipped=SKIPPED))
    return sv.save_adapter(model, tmp_path_factory.mktemp("adapter") / CLOUD_DRIVE / "adapter")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of JSON: most are sound, and there is one of each kind of error."""
    folder = tmp_path_factory.mktemp("inputs") / CLOUD_DRIVE
    folder.mkdir(parents=True)
    rows = []
    for number in range(ROWS - len(BAD)):
        Image.effect_noise((56, 56), 10.0 + number).convert("RGB").save(folder / f"{number}.png")
        rows.append({"id": f"row-{number}", "image": f"{number}.png", "category": f"thing {number}"})
    whole = (folder / "0.png").read_bytes()
    (folder / "corrupt.png").write_bytes(whole[:60] + bytes(300) + whole[360:])
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no image")
    bomb = io.BytesIO()
    Image.new("1", (3000, 3000)).save(bomb, "PNG")
    (folder / "bomb.png").write_bytes(bomb.getvalue())
    rows += [
        {"id": name, "image": f"{name}.png", "category": "x"}
        for name in ("missing", "corrupt", "truncated", "text", "bomb")
    ]
    rows.insert(9, {"id": "too-long", "image": "0.png", "category": "word " * 600})
    rows.insert(17, {"id": "row-3", "image": "0.png", "category": "x"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def settings(
    tiny_model: Path, adapter: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return {
        "name": "straight",
        "storage": str(tmp_path_factory.mktemp("runs") / CLOUD_DRIVE),
        "model": {"path": str(tiny_model), "adapter": str(adapter), "dtype": "float32"},
        "input": {"source": str(inputs), "prompt": "Describe the {category}.", "max_pixels": 1_000_000},
        "sampling": {"max_new_tokens": 24},
        "engine": {"max_sequences": 4, "kv_budget_bytes": 2**22, **ENGINE},
        "output": {"shard_rows": 7},
        "samples": 5,
        "tracking": {"experiment": "tests"},
        "scaling": {"cpus_per_worker": 1},
    }


def changed(settings: dict[str, Any], **sections: Any) -> CaptionConfig:
    merged = {
        name: {**settings.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return CaptionConfig.model_validate({**settings, **merged})


@pytest.fixture(scope="module")
def straight(settings: dict[str, Any], local_ray: None) -> dict[str, Any]:
    """The result of an undisturbed job."""
    return run_caption(CaptionConfig.model_validate(settings))


def captions_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The result's rows by their keys, which are unique."""
    rows = pq.read_table(result["captions"]).to_pylist()
    captions = {row["key"]: row for row in rows}
    assert len(captions) == len(rows) == ROWS
    return captions


def assert_same_captions(one: dict[str, Any], other: dict[str, Any]) -> None:
    ours, theirs = captions_of(one), captions_of(other)
    for key, row in ours.items():
        assert {**row, "seconds": None} == {**theirs[key], "seconds": None}


def mlflow_client(result: dict[str, Any]):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=result["mlflow_uri"], registry_uri=result["mlflow_uri"])


def engines() -> list[psutil.Process]:
    """The engines of this session's Ray only."""
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    return [child for child in psutil.Process(raylet).children() if "CaptionActor" in _command(child)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def after_first_shard(config: CaptionConfig, act: Any) -> threading.Thread:
    """Call ``act`` in the background as soon as the job has captions in a file."""
    captions = CaptionFolder(Path(config.storage), config.name).captions

    def watch() -> None:
        deadline = time.monotonic() + 0.4 * SECONDS
        while time.monotonic() < deadline:
            if list(captions.glob("0*")):
                act()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# ------------------------------------------------------------------------------------- what comes out


def test_every_key_occurs_once_with_a_caption_or_an_error(straight):
    captions = captions_of(straight)
    assert {key: row["error_kind"] for key, row in captions.items() if row["error_kind"]} == BAD
    for key, kind in BAD.items():
        assert captions[key]["text"] is None
        assert len(captions[key]["error"]) > 20, kind
    assert "0.png" not in captions["corrupt"]["error"]
    assert "corrupt.png" in captions["corrupt"]["error"]
    assert straight["rows"] == ROWS
    assert straight["captioned"] == ROWS - len(BAD)
    assert straight["errors"] == {
        "unreadable image": 3,
        "missing image": 1,
        "oversized image": 1,
        "prompt": 1,
        "duplicate key": 1,
    }


def test_captions_are_those_of_the_engine(straight, settings, adapter, tiny_model, inputs):
    model = sv.load_adapter(AutoModelForImageTextToText.from_pretrained(tiny_model), adapter)
    engine = Engine(model, AutoProcessor.from_pretrained(tiny_model))
    image = Image.open(inputs.parent / "5.png").convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "Describe the thing 5."}]
    request = Request([{"role": "user", "content": content}], [image], sampling=Sampling(max_new_tokens=24))
    (alone,) = engine.run([request])
    row = captions_of(straight)["row-5"]
    assert row["text"] == alone.text.strip()
    assert row["text"]
    assert row["finish_reason"] == alone.choices[0].finish_reason
    assert row["prompt_tokens"] == alone.usage.prompt_tokens
    assert row["output_tokens"] == alone.usage.completion_tokens
    visual = ("visual_tokens", "visual_tokens_retained", "visual_tokens_skipped")
    assert tuple(row[name] for name in visual) == (16, 4, SKIPPED)
    assert row["visual_tokens_cached"] == alone.usage.visual_cached < 16
    assert row["seconds"] > 0
    assert row["model"] == settings["model"]["path"]
    assert row["adapter"].startswith(f"{adapter}@")


def test_files_are_in_the_order_of_the_inputs(straight, inputs):
    keys = [row["key"] for row in pq.read_table(straight["captions"]).to_pylist()]
    assert [key.partition("#")[0] for key in keys] == [
        json.loads(line)["id"] for line in inputs.read_text().splitlines()
    ]
    names = sorted(path.name for path in Path(straight["captions"]).iterdir())
    assert names == [f"{number:06d}.parquet" for number in range(6)]


def test_mlflow_has_the_whole_job(straight):
    client = mlflow_client(straight)
    run = client.get_run(straight["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["skip.retained"] == "4"
    assert run.data.params["job.rows"] == str(ROWS)
    assert run.data.metrics["captioned"] == ROWS - len(BAD)
    assert run.data.metrics["errors/unreadable image"] == 3
    assert run.data.metrics["tokens/output_tokens"] == straight["tokens"]["output_tokens"] > 0
    assert run.data.metrics["ratio_to_full/kv_bytes_counted"] == straight["savings"]["kv_bytes_counted"]
    files = {file.path: file.file_size for file in client.list_artifacts(straight["mlflow_run_id"])}
    assert set(files) == {"config.yaml", "sample.html"}
    page = Path(client.download_artifacts(straight["mlflow_run_id"], "sample.html")).read_text()
    assert page.count("<tr>") == 5
    assert "data:image/jpeg;base64," in page
    assert "Describe the thing" in page


def test_counted_and_predicted_savings_agree(straight):
    savings = straight["savings"]
    assert savings["kv_bytes_counted"] == pytest.approx(savings["kv_bytes_predicted"], abs=0.02)
    assert 0 < savings["prefill_flops_predicted"] < 1


def test_a_finished_job_is_reported_and_recorded_elsewhere_without_work(
    straight, settings, capsys, monkeypatch
):
    monkeypatch.setattr("pipelines.caption.job.ray_session", lambda: 1 / 0)
    again = run_caption(CaptionConfig.model_validate(settings))
    assert again == {**straight, "already_finished": True}
    assert "job 'straight' is finished already" in capsys.readouterr().out
    moved = run_caption(changed(settings, tracking={"experiment": "elsewhere"}))
    assert moved["mlflow_run_id"] != straight["mlflow_run_id"]
    assert {**moved, "mlflow_run_id": straight["mlflow_run_id"]} == straight
    client = mlflow_client(moved)
    run = client.get_run(moved["mlflow_run_id"])
    assert client.get_experiment(run.info.experiment_id).name == "elsewhere"
    assert run.data.metrics["captioned"] == ROWS - len(BAD)
    run_caption(CaptionConfig.model_validate(settings))  # and back, in a third run


def test_the_same_name_with_other_settings_is_refused(straight, settings):
    config = changed(settings, sampling={"max_new_tokens": 5}, engine={"max_sequences": 9})
    with pytest.raises(ConfigError, match=r"sampling.max_new_tokens: was 24, now 5") as error:
        run_caption(config)
    assert "max_sequences" not in str(error.value)


@pytest.mark.slow  # the parts are tested in test_parts
def test_json_lines_two_engines_and_a_registered_adapter(straight, settings, adapter):
    """The same captions in another format, by an adapter from MLflow."""
    storage = Path(settings["storage"])
    uri = f"sqlite:///{storage / 'mlflow.db'}"
    tracker = Tracker.start(uri, experiment="tests", run_name="tuned", artifacts=storage / "mlflow-artifacts")
    version = tracker.register(adapter, "tiny-captioner", "candidate")
    config = changed(
        settings,
        name="registered",
        model={"adapter": "models:/tiny-captioner@candidate"},
        output={"format": "jsonl", "shard_rows": 100},
        scaling={"workers": 2, "readers": 2},
    )
    result = run_caption(config)
    (file,) = Path(result["captions"]).iterdir()
    rows = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())}
    expected = captions_of(straight)
    assert list(rows) == list(expected)
    assert {key: row["text"] for key, row in rows.items()} == {k: row["text"] for k, row in expected.items()}
    assert {row["adapter"] for row in rows.values()} == {f"models:/tiny-captioner/{version}"}
    assert result["tokens"] == straight["tokens"]


# --------------------------------------------------------------------------------- what dies on the way


@pytest.mark.slow
def test_a_killed_engine_and_an_absent_mlflow_cost_no_caption(straight, settings, monkeypatch):
    config = changed(settings, name="engine-killed")
    monkeypatch.setattr("pipelines.caption.stream._MAX_TASKS", 2)  # as with very many shards
    killed = []

    def kill() -> None:
        for engine in engines():
            killed.append(engine.pid)
            engine.send_signal(signal.SIGKILL)

    def fail(*_: Any) -> None:
        raise TrackingError("MLflow is away")

    watcher = after_first_shard(config, kill)
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "finish", fail)
        with pytest.raises(TrackingError, match=r"captions are complete in .* Run the same job again"):
            run_caption(config)
    watcher.join()
    assert killed
    assert not list(CaptionFolder(Path(config.storage), config.name).attempts.folder.iterdir())

    monkeypatch.setattr("pipelines.caption.job.ray_session", fail)  # nothing may be captioned again
    result = run_caption(changed(settings, name="engine-killed", tracking={"experiment": "elsewhere"}))
    assert_same_captions(straight, result)
    client = Tracker(result["mlflow_uri"], result["mlflow_run_id"])._client
    recorded = client.get_run(result["mlflow_run_id"]).info.experiment_id
    assert client.get_experiment(recorded).name == "elsewhere"


@on_vllm
@pytest.mark.slow
@pytest.mark.parametrize("which", ["vllm", "actor"])
def test_neither_vllm_nor_its_actor_outlives_the_other(straight, settings, which):
    config = changed(settings, name=f"{which}-killed")
    ended: list[psutil.Process] = []

    def kill() -> None:
        for actor in engines():
            children = actor.children(recursive=True)
            ended.extend([actor, *children])
            for process in [actor] if which == "actor" else children:
                process.kill()

    watcher = after_first_shard(config, kill)
    assert_same_captions(straight, run_caption(config))
    watcher.join()
    assert len(ended) > 1
    _, alive = psutil.wait_procs(ended, timeout=30)
    assert not alive, "nothing of the dead engine is left"


@pytest.mark.slow
def test_a_killed_job_is_resumed_and_keeps_its_captions(straight, settings, local_ray):
    config = changed(settings, name="job-killed")
    address = ray.get_runtime_context().gcs_address
    code = (
        "import sys, ray\n"
        "from pipelines.caption.config import CaptionConfig\n"
        "from pipelines.caption.job import run_caption\n"
        "ray.init(address=sys.argv[1], runtime_env={'env_vars': {'PYTHONPATH': sys.argv[2]}})\n"
        "run_caption(CaptionConfig.model_validate_json(sys.argv[3]))"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, address, PYTHONPATH, config.model_dump_json()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after_first_shard(config, job.kill).join()
    assert job.wait(60) == -signal.SIGKILL
    folder = CaptionFolder(Path(config.storage), config.name)
    state = json.loads((folder.path / "run.json").read_text())
    assert not state.get("result")
    there = {path.name: path.stat().st_mtime_ns for path in folder.captions.glob("0*")}
    assert 0 < len(there) < 6
    (folder.captions / ".000005.parquet.partial").write_bytes(b"half a file")

    result = run_caption(changed(settings, name="job-killed", engine={"max_sequences": 3}))
    assert result["mlflow_run_id"] == state["mlflow_run_id"]
    assert {name: (folder.captions / name).stat().st_mtime_ns for name in there} == there
    assert_same_captions(straight, result)


ON_TWO_NODES = """
import os, sys, threading, time
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from pipelines.caption.config import CaptionConfig
from pipelines.caption.job import run_caption

config = CaptionConfig.model_validate_json(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
other = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})

def kill():
    def there(actor):
        return actor["State"] == "ALIVE" and actor["Address"]["NodeID"] == other.node_id

    while not any(map(there, actors().values())):
        time.sleep(0.02)
    print("an engine is there", flush=True)
    cluster.remove_node(other, allow_graceful=False)
    while sum(node["Alive"] for node in ray.nodes()) > 1:  # until Ray has noticed
        time.sleep(0.5)
    print("one node is left", flush=True)

watcher = threading.Thread(target=kill, daemon=True)
watcher.start()
run_caption(config)
watcher.join()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_dies_costs_no_caption(straight, settings):
    scaling = {"workers": 2, "cpus_per_worker": 0.7, "cpus_per_reader": 0.1}
    config = changed(settings, name="node-killed", scaling=scaling, engine={"max_sequences": 1})
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", ON_TWO_NODES, config.model_dump_json()],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=SECONDS - 20,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "an engine is there" in done.stdout
    assert "one node is left" in done.stdout
    assert_same_captions(straight, run_caption(config))


# --------------------------------------------------------------------------------------- too many errors


@pytest.mark.slow
def test_too_many_error_rows_stop_the_job_early(settings, local_ray, inputs, tmp_path):
    rows = [{"id": number, "image": str(inputs.parent / "text.png")} for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = changed(
        settings,
        name="too-many",
        input={"source": str(tmp_path / "rows.jsonl"), "prompt": "?"},
        max_error_fraction=0.05,
        output={"shard_rows": 20},
    )
    with pytest.raises(
        DataError, match=r"of 200 rows are errors \(\d+ × unreadable image\), more than max_error"
    ):
        run_caption(config)
    folder = CaptionFolder(Path(config.storage), config.name)
    assert len(list(folder.captions.iterdir())) < 5
    deadline = time.monotonic() + 20
    while engines() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not engines()


# ----------------------------------------------------------------------------------- refused beforehand


@pytest.fixture
def no_ray(monkeypatch):
    """Ray must not be started."""

    def refuse():
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipelines.caption.job.ray_session", refuse)


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (
            {"input": {"source": "/no/such/folder"}},
            ConfigError,
            "input.source = /no/such/folder",
        ),
        ({"input": {"prompt": "{colour}"}}, ConfigError, "input.prompt names column 'colour'"),
        ({"model": {"path": "/no/such/model"}}, ConfigError, "model.path = /no/such/model"),
        ({"model": {"adapter": "/no/such/adapter"}}, ConfigError, "model.adapter = /no/such/adapter"),
        ({"model": {"adapter": "models:/nobody"}}, ConfigError, "models:/NAME@ALIAS"),
        ({"max_error_fraction": 0.01}, DataError, r"1 of 40 rows are errors \(1 × duplicate key\)"),
        ({"storage": "/proc/nowhere"}, ConfigError, "storage = /proc/nowhere: cannot write to"),
    ],
)
def test_mistakes_are_reported_before_ray_is_started(settings, no_ray, sections, error, message):
    with pytest.raises(error, match=message):
        run_caption(changed(settings, name="mistaken", **sections))


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("empty", "MLflow has no models:/nobody@knows"),
        ("absent", "there is no .*mlflow.db to look up models in"),
    ],
)
def test_an_adapter_that_the_registry_lacks_is_reported_before_ray_is_started(
    settings, no_ray, tmp_path, store, message
):
    if store == "empty":
        connect(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()
    unknown = {"model": {"adapter": "models:/nobody@knows"}, "storage": str(tmp_path)}
    with pytest.raises(ConfigError, match=message):
        run_caption(changed(settings, name="mistaken", **unknown))


def test_more_engines_than_fit_are_refused(settings, local_ray):
    with pytest.raises(ResourceError, match=r"9 engines with 1 CPU .* more than the cluster holds"):
        run_caption(changed(settings, name="greedy", scaling={"workers": 9}))


def test_an_adapter_that_has_changed_since_is_refused(settings, adapter, tmp_path, no_ray, monkeypatch):
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in adapter.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = changed(settings, name="moved", model={"adapter": str(copy)})
    with pytest.raises(AssertionError, match="Ray was started"):
        run_caption(config)
    (CaptionFolder(Path(config.storage), config.name).captions / "000000.parquet").write_bytes(b"begun")
    (copy / "note").write_text("trained further")
    with pytest.raises(ConfigError, match="has changed since this job began"):
        run_caption(config)


def test_a_job_that_another_process_works_on_is_refused(settings):
    config = changed(settings, name="busy")
    folder = CaptionFolder(Path(config.storage), config.name)
    with folder.claimed(), pytest.raises(ConfigError, match="in use by another process"):
        run_caption(config)


def test_several_answers_per_row_are_refused(settings):
    with pytest.raises(ValueError, match=r"sampling\.n"):
        changed(settings, sampling={"n": 2})
