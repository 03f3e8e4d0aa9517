"""Jobs and endpoint with the services of compose: PostgreSQL, S3, and MLflow on both."""

from __future__ import annotations

import json
import re
import shlex
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.infra.clusters import Jobs, free_port, rays_folder, result
from tests.infra.manifests import INFRA
from tests.infra.services import Mlflow, postgres, s3, secrets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.services,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets of Ray
]

ROWS, STEPS = 12, 40
SMALL = {
    "make_shapes": "--train 40 --validation 1 --test 4",
    "finetune": "--training.max_steps 2 --training.batch_size 4 --evaluation.answer_rows 6 "
    "--evaluation.loss_rows 6 --evaluation.max_new_tokens 4",
    "caption": "--sampling.max_new_tokens 4",
    "deploy": "--port {port}",
}
"""Options that make the documented jobs small, in the order of the page."""


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    folder = tmp_path_factory.mktemp("services")
    with secrets() as passwords, postgres(passwords) as database, s3(folder / "s3.log") as store:
        server = Mlflow(database, store, passwords, folder / "mlflow.log")
        for _ in range(2):  # as every `docker compose up` does
            server.create_bucket()
        server.start()
        yield server
        server.kill()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    """Starts jobs that join one Ray."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 12, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    with rays_folder():
        cluster = Cluster(initialize_head=True, head_node_args=head)
        started = Jobs(cluster.address, tmp_path)
        yield started
        started.end()
        cluster.shutdown()


@dataclass(frozen=True)
class Settings:
    """Settings of jobs that record in one experiment, and register adapters as one model."""

    mlflow: Mlflow
    storage: Path
    model: Path
    data: Path
    name: str

    def job(self, name: str, **settings: Any) -> dict[str, Any]:
        tracking = {"uri": self.mlflow.url, "experiment": self.name, **settings.pop("tracking", {})}
        return {"name": name, "storage": str(self.storage), "tracking": tracking, **settings}

    def tuning(self, name: str) -> dict[str, Any]:
        return self.job(
            name,
            model={"path": str(self.model)},
            data={"train": str(self.data / "train.json")},
            skip={"retained": 4, "skipped": 4},
            lora={"rank": 2},
            training={"max_steps": STEPS, "batch_size": 2, "checkpoint_every": 10, "log_every": 1},
            tracking={"registered_model": self.name, "system_metrics_seconds": 0},
            scaling={"cpus_per_worker": 1},
        )

    def captioning(self, name: str, adapter: str) -> dict[str, Any]:
        return self.job(
            name,
            model={"path": str(self.model), "adapter": adapter},
            input={"source": str(self.data / "images"), "limit": ROWS},
            sampling={"max_new_tokens": 4},
            output={"shard_rows": 5},
            samples=2,
            scaling={"cpus_per_worker": 1},
        )

    def scoring(self, name: str, adapter: str) -> dict[str, Any]:
        image = next((self.data / "images").rglob("*.png"))
        table = self.storage / "questions.tsv"
        rows = [f"{number}\t{image}\tWhat is it?\ta circle\n" for number in range(3)]
        table.write_text("index\timage_path\tquestion\tanswer\n" + "".join(rows))
        model = {"path": str(self.model)}
        return self.job(
            name,
            systems={"full": {"model": model}, "tuned": {"model": {**model, "adapter": adapter}}},
            datasets=[{"name": "mine", "path": str(table), "rule": "exact"}],
            sampling={"max_new_tokens": 4},
            resamples=100,
            scaling={"cpus_per_worker": 1},
        )

    def serving(self, port: int, **adapters: str) -> dict[str, Any]:
        model: dict[str, Any] = {"path": str(self.model), "name": "tiny", "adapters": adapters}
        model["scaling"] = {"cpus_per_engine": 0.5}
        return {"models": [model], "port": port, "tracking_uri": self.mlflow.url}


def assert_tuned(mlflow: Mlflow, tuned: dict[str, Any]) -> None:
    """Every step is in PostgreSQL, and the adapter in S3."""
    run = tuned["mlflow_run_id"]
    client = mlflow.client()
    assert client.get_run(run).info.status == "FINISHED"
    steps = Counter(point.step for point in client.get_metric_history(run, "loss"))
    assert steps == Counter(range(1, STEPS + 1))
    adapter = Path(tuned["adapter"])
    files = {f"adapter/{path.name}": path.stat().st_size for path in adapter.iterdir()}
    assert files.items() <= mlflow.in_s3(run).items()
    assert "adapter/adapter_model.safetensors" in files


def assert_captioned(mlflow: Mlflow, captioned: dict[str, Any], version: str, images: Path) -> None:
    """No row is lost or repeated, the run is finished, and its page of samples is in S3."""
    rows = pq.read_table(captioned["captions"])
    wanted = sorted(str(path.relative_to(images)) for path in images.rglob("*.*"))[:ROWS]
    assert sorted(rows["key"].to_pylist()) == wanted
    assert set(rows["adapter"].to_pylist()) == {version}
    assert set(rows["error"].to_pylist()) == {None}
    run = mlflow.client().get_run(captioned["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["captioned"] == ROWS
    assert {"config.yaml", "sample.html"} <= set(mlflow.in_s3(run.info.run_id))


def assert_scored(mlflow: Mlflow, scored: dict[str, Any]) -> None:
    """Every question has an answer, and both runs are finished."""
    assert scored["errors"] == {"full": {"mine": 0}, "tuned": {"mine": 0}}
    runs = [mlflow.client().get_run(run) for run in scored["mlflow_run_ids"].values()]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def answer(port: int, model: str = "tuned") -> str:
    """The model that answers a request for ``model``."""
    messages = [{"role": "user", "content": "What is it?"}]
    body = json.dumps({"model": model, "max_tokens": 4, "messages": messages}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["model"])


def test_from_fine_tuning_to_the_endpoint_with_mlflow_killed_in_between(
    jobs, mlflow, tiny_model, shapes_data, tmp_path
):
    settings = Settings(mlflow, tmp_path, tiny_model, shapes_data, "chain")
    tuned = result(jobs.start("finetune", settings.tuning("tuned")))
    assert_tuned(mlflow, tuned)
    version = mlflow.client().get_model_version_by_alias("chain", "candidate")
    assert version.run_id == tuned["mlflow_run_id"]
    name = "models:/chain@candidate"

    captioning = settings.captioning("captions", name)
    interrupted = jobs.start("caption", captioning)
    for line in interrupted.stdout:
        if line.startswith("row "):
            mlflow.kill()
            break
    output = interrupted.communicate()[0]
    assert interrupted.returncode == 1
    assert "Run the same job again to record them" in output
    mlflow.start()
    captioned = result(jobs.start("caption", captioning))
    assert_captioned(mlflow, captioned, f"models:/chain/{version.version}", shapes_data / "images")

    assert_scored(mlflow, result(jobs.start("score", settings.scoring("scores", name))))

    port = free_port()
    result(jobs.start("deploy", settings.serving(port, tuned=name)))
    assert answer(port) == "tuned"
    mlflow.kill()
    assert answer(port) == "tuned"
    mlflow.start()


def test_two_writers_at_once_with_mlflow_killed_in_between(jobs, mlflow, tiny_model, shapes_data, tmp_path):
    # Neither the experiment nor the registered model exists: both jobs create them.
    settings = Settings(mlflow, tmp_path, tiny_model, shapes_data, "pair")
    started = [jobs.start("finetune", settings.tuning(name), name) for name in ("one", "two")]
    tuned = [result(process) for process in started]
    for one in tuned:
        assert_tuned(mlflow, one)
    versions = {one.run_id: one for one in mlflow.client().search_model_versions("name='pair'")}
    assert sorted(versions) == sorted(one["mlflow_run_id"] for one in tuned)
    assert {one.version for one in versions.values()} == {"1", "2"}
    assert mlflow.client().get_model_version_by_alias("pair", "candidate").run_id in versions

    adapters = {f"adapter-{number}": f"models:/pair/{number}" for number in (1, 2)}
    port = free_port()
    result(jobs.start("deploy", settings.serving(port, **adapters)))
    jobs_of = {name: settings.captioning(name, adapter) for name, adapter in adapters.items()}
    captioning = {name: jobs.start("caption", job, name) for name, job in jobs_of.items()}
    for process in captioning.values():
        assert any(line.startswith("row ") for line in process.stdout)
    mlflow.kill()
    outputs = {name: process.communicate()[0] for name, process in captioning.items()}
    assert [answer(port, name) for name in adapters] == list(adapters)
    mlflow.start()
    # The job that began first may have recorded its captions before the end of MLflow.
    unrecorded = [name for name, process in captioning.items() if process.returncode]
    assert unrecorded
    assert [name for name in unrecorded if "Run the same job again to record them" not in outputs[name]] == []
    captioning |= {name: jobs.start("caption", jobs_of[name], name) for name in unrecorded}
    for name, process in captioning.items():
        captioned = result(process) if name in unrecorded else json.loads(outputs[name].splitlines()[-1])
        assert_captioned(mlflow, captioned, adapters[name], shapes_data / "images")

    scoring = {name: settings.scoring(f"scores-{name}", adapter) for name, adapter in adapters.items()}
    for process in [jobs.start("score", job, f"scores-{name}") for name, job in scoring.items()]:
        assert_scored(mlflow, result(process))
    assert [answer(port, name) for name in adapters] == list(adapters)


def test_the_quick_start_of_compose(jobs, mlflow, tmp_path):
    """The documented commands in ``ray-head``, made small, with /shared in another place."""
    page = (INFRA.parent / "docs/deploy.md").read_text()
    lines = [shlex.split(line) for line in re.findall(r"exec ray-head \\\n +python (jobs/.*)", page)]
    assert [Path(script).stem for script, *_ in lines] == list(SMALL)
    port, results = free_port(), []
    for script, *options in lines:
        given = [option.replace("http://mlflow:5000", mlflow.url) for option in options]
        small = SMALL[Path(script).stem].format(port=port).split()
        results.append(result(jobs.run(script, *given, *small, SKIPVISION_HOME=str(tmp_path))))
    _, tuned, captioned, deployed = results
    assert tuned["adapter"] == str(tmp_path / "runs/demo/adapter")
    assert captioned["captioned"] == 4
    for one in (tuned, captioned):
        assert mlflow.client().get_run(one["mlflow_run_id"]).info.status == "FINISHED"
    assert answer(port, deployed["models"][-1]) == deployed["models"][-1]
