"""The services that MLflow needs in compose, and MLflow itself, as processes of this machine.

PostgreSQL's server comes from the machine, the S3 server and the clients of both from the extra `services`.
The commands that start MLflow and create its bucket are those of the compose file.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.infra.clusters import free_port, wait_for
from tests.infra.manifests import INFRA

if TYPE_CHECKING:
    from mlflow import MlflowClient

COMPOSE = yaml.safe_load((INFRA / "compose/compose.yaml").read_text())["services"]


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


def wait(condition: Callable[[], Any], what: str, seconds: float = 300) -> None:
    assert wait_for(condition, seconds), f"{what} did not start within {seconds:g} s"


@contextmanager
def secrets() -> Iterator[Path]:
    """A folder with the passwords that compose mounts as secrets."""
    with tempfile.TemporaryDirectory(prefix="secrets-", dir="/tmp") as folder:
        for name in COMPOSE["mlflow"]["secrets"]:
            Path(folder, name).write_text(f"the {name}")
        yield Path(folder)


@contextmanager
def postgres(secrets: Path) -> Iterator[str]:
    """The address of a server with the database and the user ``mlflow``."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (installed[-1] if installed else None)
    if initdb is None:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    with tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp") as folder:
        password = Path(shutil.copy(secrets / "postgres_password", folder))
        for path in (folder, password):
            if user is not None:
                shutil.chown(path, user)
        with _server(Path(initdb).resolve().parent, Path(folder), user, password) as address:
            yield address


@contextmanager
def _server(binaries: Path, folder: Path, user: str | None, password: Path) -> Iterator[str]:
    data, port = folder / "data", str(free_port())
    command = [binaries / "initdb", "-D", data, "-U", "mlflow", "--auth=scram-sha-256", "--no-sync"]
    command.append(f"--pwfile={password}")
    subprocess.run(command, user=user, cwd=folder, check=True, capture_output=True)
    command = [binaries / "postgres", "-D", data, "-p", port, "-k", folder, "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command, user=user, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        there = ["-h", "127.0.0.1", "-p", port, "-U", "mlflow"]
        ready = [binaries / "pg_isready", *there]
        wait(lambda: subprocess.run(ready, capture_output=True).returncode == 0, "PostgreSQL")
        environment = {**os.environ, "PGPASSWORD": password.read_text()}
        create = [binaries / "createdb", *there, "mlflow"]
        subprocess.run(create, env=environment, check=True, capture_output=True)
        yield f"127.0.0.1:{port}"
    finally:
        end(server, signal.SIGINT)


@contextmanager
def s3(log: Path) -> Iterator[str]:
    """The URL of an S3 server."""
    missing = [name for name in ("moto", "boto3", "psycopg") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (pip install '.[services]')")
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        wait(lambda: answers(url), "the S3 server")
        yield url
    finally:
        end(server, signal.SIGKILL)


@dataclass
class Mlflow:
    """MLflow's server, started with the command and the environment of the compose file."""

    postgres: str
    s3: str
    secrets: Path
    log: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _here(self, text: str) -> str:
        """Replace the addresses and paths of compose by those of this machine."""
        names = {"$$": "$", "/run/secrets": str(self.secrets), "0.0.0.0": "127.0.0.1"}
        names |= {"@postgres/": f"@{self.postgres}/", "http://s3:8333": self.s3}
        text = re.sub(r"\b5000\b", str(self.port), text)
        for name, here in names.items():
            text = text.replace(name, here)
        return text

    def _start(self, service: str) -> subprocess.Popen[bytes]:
        own = {name: self._here(value) for name, value in COMPOSE[service]["environment"].items()}
        binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # The image sets this variable.
        own |= {"PATH": binaries, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [self._here(part) for part in COMPOSE[service]["command"]]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, env={**os.environ, **own}, stdout=log, stderr=log, start_new_session=True
            )

    def create_bucket(self) -> None:
        assert self._start("bucket").wait(120) == 0, self.log.read_text()

    def start(self) -> None:
        self.process = self._start("mlflow")
        wait(lambda: answers(f"{self.url}/health"), "MLflow")

    def kill(self) -> None:
        assert self.process is not None
        end(self.process, signal.SIGKILL)

    def client(self) -> MlflowClient:
        from pipelines.tracking.client import connect

        return connect(self.url)

    def in_s3(self, run: str) -> dict[str, int]:
        """The sizes of a run's artifacts by name, as the S3 server lists them."""
        with urllib.request.urlopen(f"{self.s3}/mlflow?list-type=2", timeout=30) as response:
            text = response.read().decode()
        entry = rf"<Key>[^<]*/{run}/artifacts/([^<]*)</Key>.*?<Size>(\d+)</Size>"
        return {name: int(size) for name, size in re.findall(entry, text, re.DOTALL)}
