"""One MLflow run: parameters, metrics, artifacts and registered models."""

from __future__ import annotations

import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml

from pipelines.shared.sections import flatten
from pipelines.tracking.client import (
    TrackingError,
    brief,
    configure_mlflow,
    connect,
    failure,
    unless_exists,
    with_retries,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

T = TypeVar("T")

_MAX_NAME = 240
"""MLflow accepts metric names of 250 characters."""


class Tracker:
    """One MLflow run, opened by this process; several processes may record in the same run.

    `metrics`, `flush`, `watch_system` and `close` never raise and do not delay their caller for long. All
    other methods raise `TrackingError` when MLflow does not answer after a few tries.

    ``advice`` ends the message of a `TrackingError`: it names the folder of the results and the next step.
    """

    def __init__(
        self, uri: str, run_id: str, *, flush_seconds: float = 2.0, retry_seconds: float = 60.0
    ) -> None:
        self.uri, self.run_id = uri, run_id
        self.resumed = False
        self.advice = ""
        self._flush_seconds, self._retry_seconds = flush_seconds, retry_seconds
        # Bounded: if a server does not answer for days, the oldest values are dropped.
        self._waiting: deque[Metric] = deque(maxlen=200_000)
        self._next_flush = self._away_until = 0.0
        self._monitor: SystemMetricsMonitor | None = None
        self._refusal: Exception | None = None

    @cached_property
    def _client(self) -> MlflowClient:
        return connect(self.uri)

    @classmethod
    def start(
        cls, uri: str, *, experiment: str, run_name: str, artifacts: Path, run_id: str | None = None
    ) -> Tracker:
        """Start a run, or resume ``run_id``.

        Args:
            uri: MLflow's tracking URI.
            experiment: created if it does not exist.
            run_name: name of a new run.
            artifacts: folder for artifacts where no server decides that.
            run_id: the run to resume.
        """

        def begin() -> str:
            client = connect(uri)
            if run_id is not None:
                client.update_run(run_id, status="RUNNING")
                return run_id
            identity = _experiment_id(client, uri, experiment, artifacts)
            return str(client.create_run(identity, run_name=run_name).info.run_id)

        run = cls(uri, with_retries(begin, f"starting the run at {uri}", pauses=()))
        run.resumed = run_id is not None
        return run

    # ------------------------------------------------------------------------------------- strict

    def require(self) -> None:
        """Check that MLflow answers and has the run."""
        with_retries(
            lambda: self._client.get_run(self.run_id),
            f"looking for run {self.run_id} at {self.uri}",
            pauses=(),
        )

    def describe(self, settings: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        """Record parameters, and a job's settings as ``config.yaml``."""
        self.parameters(parameters)
        self.text(yaml.safe_dump(dict(settings), sort_keys=False), "config.yaml")

    def parameters(self, values: Mapping[str, object]) -> None:
        """Record parameters; nested mappings become dotted names."""
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in _with_valid_names(flatten(values)).items()]
        for start in range(0, len(params), 100):  # MLflow's limit per call
            self._call(
                "recording parameters",
                partial(self._client.log_batch, self.run_id, params=params[start : start + 100]),
            )

    def text(self, text: str, file: str) -> None:
        """Store a text as an artifact."""
        self._call(f"storing {file}", lambda: self._client.log_text(self.run_id, text, file))

    def tag(self, name: str, text: str) -> None:
        """Set one tag of the run."""
        self._call(f"setting the tag {name}", lambda: self._client.set_tag(self.run_id, name, text))

    def store(self, path: Path) -> None:
        """Store a file or folder as an artifact under its own name."""
        self._call(f"storing {path}", lambda: self._log(path))

    def register(self, folder: Path, name: str, alias: str) -> str:
        """Store a folder, make it a version of the registered model ``name``, and return the version.

        A second call of the same run returns the version of the first.
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

        return self._call(f"registering {folder} as {name}", register)

    def upload(self) -> None:
        """Upload the metrics that are still in memory, and raise `TrackingError` if some remain."""
        if missing := self.close():
            what = f"MLflow at {self.uri} did not take {missing} values of run {self.run_id}"
            raise TrackingError(what) if self._refusal is None else failure(self._refusal, what)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the run. It can be FINISHED only after all metrics are uploaded."""
        if status == "FINISHED":
            self.upload()
        self._call("ending the run", lambda: self._client.set_terminated(self.run_id, status))

    def _log(self, path: Path) -> None:
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), path.name)
        else:
            self._client.log_artifact(self.run_id, str(path))

    def _call(self, action: str, call: Callable[[], T]) -> T:
        return with_retries(call, f"{action} (run {self.run_id} at {self.uri})", pauses=(1.0, 4.0))

    # ------------------------------------------------------------------------------------ lenient

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record the values of one step. They are uploaded in batches, and later if MLflow does not answer.

        Characters that MLflow refuses in a name become underscores.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting.extend(
            Metric(name, float(value), now, step) for name, value in _with_valid_names(values).items()
        )
        if time.monotonic() >= self._next_flush:
            self.flush()

    def watch_system(self, seconds: float) -> None:
        """Sample CPU, memory, disk, network and GPUs of this machine until `close`.

        The samples continue those of an earlier start.
        """
        try:
            configure_mlflow()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self.run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=self.uri
            )
            self._monitor.start()
        except Exception as error:
            warnings.warn(f"no system metrics: {brief(error)}", stacklevel=2)

    def close(self) -> int:
        """Upload waiting metrics and return how many values MLflow did not take. The run stays open."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        self._away_until = 0.0
        self.flush()
        return len(self._waiting)

    def flush(self) -> None:
        """Upload waiting metrics, unless MLflow has just failed."""
        if time.monotonic() < self._away_until:
            return
        try:
            while self._waiting:
                batch = list(islice(self._waiting, 1000))  # MLflow's limit per call
                self._client.log_batch(self.run_id, metrics=batch)
                for _ in batch:
                    self._waiting.popleft()
            self._next_flush = time.monotonic() + self._flush_seconds
        # No error of a tracking server or of the network may end a training run.
        except Exception as error:
            self._next_flush = self._away_until = time.monotonic() + self._retry_seconds
            self._refusal = error
            warnings.warn(
                f"MLflow at {self.uri} does not take metrics ({brief(error)}); the run continues, and "
                f"{len(self._waiting)} values wait for the next try",
                stacklevel=3,
            )


def _with_valid_names(values: Mapping[str, T]) -> dict[str, T]:
    """Return the values under names that MLflow accepts; different names stay different."""
    valid: dict[str, T] = {}
    for name, value in values.items():
        parts = re.sub(r"[^\w\-. /]", "_", name).split("/")
        path = "/".join("_" if part in ("", ".", "..") else part for part in parts)[:_MAX_NAME]
        path = f"{path}_" if path.endswith("/") else path
        while path in valid:
            path += "_"
        valid[path] = value
    return valid


def _experiment_id(client: MlflowClient, uri: str, name: str, artifacts: Path) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Without a server MLflow would store artifacts in the working directory.
        location = None if uri.startswith(("http://", "https://", "databricks")) else artifacts.as_uri()
        unless_exists(lambda: client.create_experiment(name, artifact_location=location))
        experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise TrackingError(f"MLflow at {uri} has no experiment {name!r} after creating it: is it deleted?")
    return str(experiment.experiment_id)
