"""MLflow, and the only file that imports it (inside functions: the import takes seconds).

Rules when MLflow cannot be reached: at the start of a run that is an error at once, before anything
is spent; while a run goes on, metrics wait in memory and a warning says so; at the end what is
missing is an error that says how to hand it in, and nothing that was trained is lost.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pipelines.shared.sections import flatten
from pipelines.tracking.client import TrackingError, brief, connect, quieten, unless_exists, with_retries

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

T = TypeVar("T")


class Tracker:
    """One MLflow run, open in this process; other processes may have it open too.

    `metrics`, `flush`, `watch_system` and `close` never raise and never hold up their caller for long; all
    other methods raise `TrackingError` when MLflow does not answer after a few tries.
    """

    def __init__(
        self, uri: str, run_id: str, *, flush_seconds: float = 2.0, retry_seconds: float = 60.0
    ) -> None:
        self.uri, self.run_id = uri, run_id
        self._flush_seconds, self._retry_seconds = flush_seconds, retry_seconds
        # Bounded: with a server that stays away for days, the oldest values go.
        self._waiting: deque[Metric] = deque(maxlen=200_000)
        self._next_flush = self._away_until = 0.0
        self._monitor: SystemMetricsMonitor | None = None
        self._refused = ""

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self.uri)

    @classmethod
    def start(
        cls, uri: str, *, experiment: str, run_name: str, artifacts: Path, run_id: str | None = None
    ) -> Tracker:
        """A new run, or ``run_id`` again. ``artifacts`` is where artifacts go if no server decides that."""

        def begin() -> str:
            client = connect(uri)
            if run_id is not None:
                client.update_run(run_id, status="RUNNING")
                return run_id
            identity = _experiment_id(client, uri, experiment, artifacts)
            return str(client.create_run(identity, run_name=run_name).info.run_id)

        return cls(uri, with_retries(begin, f"starting the run at {uri}", pauses=()))

    # ------------------------------------------------------------------------------------- strict

    def parameters(self, values: Mapping[str, object]) -> None:
        """Record parameters; nested mappings become dotted names."""
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in flatten(values).items()]
        for start in range(0, len(params), 100):  # MLflow's limit per call
            self._insist(
                "recording parameters",
                partial(self._client.log_batch, self.run_id, params=params[start : start + 100]),
            )

    def text(self, text: str, file: str) -> None:
        """Store a text as an artifact."""
        self._insist(f"storing {file}", lambda: self._client.log_text(self.run_id, text, file))

    def note(self, name: str, text: str) -> None:
        """Tag the run."""
        self._insist(f"noting {name}", lambda: self._client.set_tag(self.run_id, name, text))

    def store(self, path: Path) -> None:
        """Store a file or folder as an artifact under its own name."""
        self._insist(f"storing {path}", lambda: self._log(path))

    def register(self, folder: Path, name: str, alias: str) -> str:
        """Store a folder and make it a new version of the registered model ``name``; returns the version.

        A version this run has registered already is used again, so that it can be called twice.
        """

        def register() -> str:
            client = self._client
            self._log(folder)
            if not client.search_registered_models(f"name = '{name}'"):
                unless_exists(lambda: client.create_registered_model(name))
            ours = client.search_model_versions(f"run_id = '{self.run_id}' and name = '{name}'")
            source = f"runs:/{self.run_id}/{folder.name}"
            version = (
                ours[0] if ours else client.create_model_version(name, source=source, run_id=self.run_id)
            )
            client.set_registered_model_alias(name, alias, version.version)
            return str(version.version)

        return self._insist(f"registering {folder} as {name}", register)

    def hand_in(self) -> None:
        """Hand in all metrics that wait."""
        if missing := self.close():
            raise TrackingError(
                f"MLflow at {self.uri} did not take {missing} values of run {self.run_id}: {self._refused}"
            )

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the run; it is not FINISHED while metrics wait."""
        if status == "FINISHED":
            self.hand_in()
        self._insist("ending the run", lambda: self._client.set_terminated(self.run_id, status))

    def _log(self, path: Path) -> None:
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), path.name)
        else:
            self._client.log_artifact(self.run_id, str(path))

    def _insist(self, doing: str, call: Callable[[], T]) -> T:
        return with_retries(call, f"{doing} (run {self.run_id} at {self.uri})", pauses=(1.0, 4.0))

    # ------------------------------------------------------------------------------------ lenient

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one step; they leave in batches, later if MLflow is away.

        What MLflow refuses in a name becomes an underscore.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting.extend(
            Metric(name, float(value), now, step) for name, value in _acceptable(values).items()
        )
        if time.monotonic() >= self._next_flush:
            self.flush()

    def watch_system(self, seconds: float) -> None:
        """Sample this machine's CPU, memory, disk, network and GPUs until `close`, behind earlier samples."""
        try:
            quieten()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self.run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=self.uri
            )
            self._monitor.start()
        except Exception as error:
            warnings.warn(f"no system metrics: {brief(error)}", stacklevel=2)

    def close(self) -> int:
        """Hand in what waits; returns how many values MLflow never got. The run itself stays open."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self._away_until = 0.0
        self.flush()
        return len(self._waiting)

    def flush(self) -> None:
        """Hand in what waits, unless MLflow was away a moment ago."""
        if time.monotonic() < self._away_until:
            return
        try:
            while self._waiting:
                some = list(islice(self._waiting, 1000))  # MLflow's limit per call
                self._client.log_batch(self.run_id, metrics=some)
                for _ in some:
                    self._waiting.popleft()
            self._next_flush = time.monotonic() + self._flush_seconds
        # Whatever a tracking server and the network can do wrong must not end a training run.
        except Exception as error:
            self._next_flush = self._away_until = time.monotonic() + self._retry_seconds
            self._refused = brief(error)
            warnings.warn(
                f"MLflow at {self.uri} does not take metrics ({brief(error)}); the run goes on, and "
                f"{len(self._waiting)} values wait for the next try",
                stacklevel=3,
            )


_LONGEST_NAME = 240
"""MLflow takes 250 characters."""


def _acceptable(values: Mapping[str, float]) -> dict[str, float]:
    """The values under names that MLflow takes; two names that become the same one stay two."""
    found: dict[str, float] = {}
    for name, value in values.items():
        parts = re.sub(r"[^\w\-. /]", "_", name).split("/")
        path = "/".join("_" if part in ("", ".", "..") else part for part in parts)[:_LONGEST_NAME]
        path = f"{path}_" if path.endswith("/") else path
        while path in found:
            path += "_"
        found[path] = value
    return found


def _experiment_id(client: MlflowClient, uri: str, name: str, artifacts: Path) -> str:
    if client.get_experiment_by_name(name) is None:
        # Without a server MLflow would put artifacts into the working directory.
        location = None if uri.startswith(("http://", "https://", "databricks")) else artifacts.as_uri()
        unless_exists(lambda: client.create_experiment(name, artifact_location=location))
    return str(client.get_experiment_by_name(name).experiment_id)
