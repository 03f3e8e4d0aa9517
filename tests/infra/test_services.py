"""Jobs and endpoint with the services that compose and Kubernetes start: PostgreSQL, S3, and MLflow on both.

PostgreSQL's server comes from the machine, the S3 server and the clients of both from the extra `services`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
SKIP = {"retained": 4, "skipped": 4}
MODEL = "services"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.services,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # sockets of Ray
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds:g} s"
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=10).status < 500
    except OSError:
        return False


def end(process: subprocess.Popen[Any], number: int = signal.SIGTERM) -> None:
    """Send a signal to the process and its children, and wait for it."""
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(60)


# ------------------------------------------------------------------------------------------ the services


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a database ``mlflow``."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (installed[-1] if installed else None)
    if initdb is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    binaries = Path(initdb).resolve().parent
    folder, port = tmp_path_factory.mktemp("postgres"), free_port()
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
        for parent in folder.parents:
            if parent.owner() == "root" and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    data = folder / "data"
    command = [binaries / "initdb", "-D", data, "-U", "mlflow", "--auth=trust", "--no-sync"]
    subprocess.run(command, user=user, cwd=folder, check=True, capture_output=True)
    command = [binaries / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, user=user, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow"]
        wait_for(lambda: subprocess.run(ready, capture_output=True).returncode == 0, "PostgreSQL's start")
        create = [binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        subprocess.run(create, check=True, capture_output=True)
        yield f"postgresql://mlflow@127.0.0.1:{port}/mlflow"
    finally:
        end(server, signal.SIGINT)


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server with the bucket ``artifacts``."""
    missing = [name for name in ("moto", "boto3", "psycopg") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (pip install '.[services]')")
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    with (tmp_path_factory.mktemp("s3") / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(url), "the S3 server's start")
        urllib.request.urlopen(urllib.request.Request(f"{url}/artifacts", method="PUT"), timeout=30)
        yield url
    finally:
        end(server, signal.SIGKILL)


@dataclass
class Mlflow:
    """MLflow's server, as the compose file and KubeRay's manifests start it."""

    database: str
    bucket: str
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.database, "--artifacts-destination", "s3://artifacts"]
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.bucket,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", "1"],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: answers(f"{self.url}/health"), "MLflow's start", 300)

    def kill(self) -> None:
        assert self.process is not None
        end(self.process, signal.SIGKILL)


@pytest.fixture(scope="module")
def mlflow(postgres: str, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    server = Mlflow(postgres, bucket, tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


# ---------------------------------------------------------------------------------------------- the jobs


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray that jobs join, so that each does not start its own."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    head = {"num_cpus": 12, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    yield started.address
    started.shutdown()


@dataclass(frozen=True)
class Jobs:
    """Starts the scripts of jobs/, with their files in one folder and their runs in one MLflow."""

    folder: Path
    cluster: str
    tracking: str

    def start(self, job: str, name: str, settings: dict[str, Any]) -> subprocess.Popen[str]:
        if job != "deploy":
            settings = {"name": name, "storage": str(self.folder), **settings}
            settings.setdefault("tracking", {})["uri"] = self.tracking
        config = self.folder / f"{name}.json"
        config.write_text(json.dumps(settings))
        environment = {**os.environ, "RAY_ADDRESS": self.cluster, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, ROOT / "jobs" / f"{job}.py", "--config", config],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    @staticmethod
    def result(process: subprocess.Popen[str], watch: Callable[[str], object] = lambda _: None) -> Any:
        """Return the last line of a job, which is its result. ``watch`` gets every line."""
        lines: list[str] = []
        with process:
            for line in process.stdout:
                lines.append(line)
                watch(line)
        assert process.returncode == 0, "".join(lines[-60:])
        return json.loads(lines[-1])


@pytest.fixture
def jobs(tmp_path: Path, cluster: str, mlflow: Mlflow) -> Jobs:
    return Jobs(tmp_path, cluster, mlflow.url)


def tuning(model: Path, data: Path, steps: int) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {"train": str(data / "train.json")},
        "skip": SKIP,
        "lora": {"rank": 2},
        "training": {"max_steps": steps, "batch_size": 2, "checkpoint_every": 10, "log_every": 1},
        "tracking": {"registered_model": MODEL, "system_metrics_seconds": 0},
        "scaling": {"cpus_per_worker": 1},
    }


def captioning(model: Path, data: Path, version: str) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "adapter": version},
        "input": {"source": str(data / "images"), "limit": 12},
        "sampling": {"max_new_tokens": 4},
        "output": {"shard_rows": 5},
        "samples": 2,
        "scaling": {"cpus_per_worker": 1},
    }


def questions(data: Path, path: Path) -> Path:
    image = next((data / "images").rglob("*.png"))
    lines = [{"index": n, "question": "What is it?", "answer": "a", "image": str(image)} for n in range(3)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_from_fine_tuning_to_the_endpoint_with_mlflow_killed_once(
    jobs, mlflow, tiny_model, shapes_data, tmp_path
):
    from pipelines.tracking.client import connect

    steps = 40
    tuned = jobs.result(jobs.start("finetune", "tuned", tuning(tiny_model, shapes_data, steps)))
    client = connect(mlflow.url)
    history = client.get_metric_history(tuned["mlflow_run_id"], "loss")
    assert sorted({point.step for point in history}) == list(range(1, steps + 1))
    version = client.get_model_version_by_alias(MODEL, "candidate")
    assert version.run_id == tuned["mlflow_run_id"]

    name = f"models:/{MODEL}@candidate"
    settings = captioning(tiny_model, shapes_data, name)
    interrupted = jobs.start("caption", "captions", settings)
    for line in interrupted.stdout:
        if line.startswith("row "):
            mlflow.kill()
            break
    output = interrupted.communicate()[0]  # the job captions all rows, and cannot end its run
    assert "run the same job again" in output.lower(), output
    mlflow.start()
    captioned = jobs.result(jobs.start("caption", "captions", settings))
    assert (captioned["captioned"], captioned["adapter"]) == (12, f"models:/{MODEL}/{version.version}")
    kinds = {artifact.path for artifact in client.list_artifacts(captioned["mlflow_run_id"])}
    assert "sample.html" in kinds

    file = questions(shapes_data, tmp_path / "questions.jsonl")
    systems = {
        "full": {"model": {"path": str(tiny_model)}},
        "tuned": {"model": {"path": str(tiny_model), "adapter": name}},
    }
    datasets = [{"name": "mine", "path": str(file), "rule": "exact"}]
    scoring = {"systems": systems, "datasets": datasets, "sampling": {"max_new_tokens": 4}, "resamples": 100}
    scored = jobs.result(jobs.start("score", "scores", {**scoring, "scaling": {"cpus_per_worker": 1}}))
    assert client.get_run(scored["mlflow_run_id"]).info.status == "FINISHED"

    serve(jobs, tiny_model, name)


def serve(jobs: Jobs, model: Path, adapter: str) -> None:
    """Deploy the adapter by its alias, and ask it."""
    port = free_port()
    section = {"path": str(model), "name": "tiny", "adapters": {"tuned": adapter}}
    section["scaling"] = {"cpus_per_engine": 0.5}
    process = jobs.start(
        "deploy", "endpoint", {"models": [section], "port": port, "tracking_uri": jobs.tracking}
    )
    jobs.result(process)
    messages = [{"role": "user", "content": "What is it?"}]
    body = json.dumps({"model": "tuned", "max_tokens": 4, "messages": messages}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        assert json.load(response)["model"] == "tuned"


def test_two_writers_register_and_caption_at_once(jobs, mlflow, tiny_model, shapes_data):
    from pipelines.tracking.client import connect

    names = ("one", "two")
    started = [jobs.start("finetune", name, tuning(tiny_model, shapes_data, 12)) for name in names]
    tuned = [jobs.result(process) for process in started]
    client = connect(mlflow.url)
    runs = {result["mlflow_run_id"] for result in tuned}
    versions = [one for one in client.search_model_versions(f"name='{MODEL}'") if one.run_id in runs]
    assert len({one.version for one in versions}) == 2
    assert client.get_model_version_by_alias(MODEL, "candidate").run_id in runs

    wanted = {f"captions-{one.version}": f"models:/{MODEL}/{one.version}" for one in versions}
    settings = {name: captioning(tiny_model, shapes_data, version) for name, version in wanted.items()}
    started = [jobs.start("caption", name, one) for name, one in settings.items()]
    captioned = [jobs.result(process) for process in started]
    for result, version in zip(captioned, wanted.values(), strict=True):
        rows = pq.read_table(result["captions"])
        assert set(rows["adapter"].to_pylist()) == {version}
        assert rows.num_rows == 12
        assert client.get_run(result["mlflow_run_id"]).info.status == "FINISHED"
