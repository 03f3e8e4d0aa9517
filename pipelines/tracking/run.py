"""MLflow, and the only file that imports it (inside functions: the import takes seconds).

Rules when MLflow cannot be reached: at the start of a run that is an error at once, before anything
is spent; while a run goes on, metrics wait in memory and a warning says so; at the end what is
missing is an error that says how to hand it in, and nothing that was trained is lost.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from skipvision.errors import ConfigError, SkipVisionError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

T = TypeVar("T")

_NO_SUCH_MODEL = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for names, versions and aliases that it does not know."""


class TrackingError(SkipVisionError):
    """MLflow could not be reached, or refused what it was given."""


class TrackingConfig(BaseModel):
    """Where runs are recorded, and under which names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = Field(
        None,
        description="MLflow tracking URI, e.g. http://server:5000; null = <storage>/mlflow.db, sqlite",
    )
    experiment: str = Field("skip-vision", description="MLflow experiment the run belongs to")

    def absolute_uri(self, storage: Path) -> str:
        """The URI to use; a sqlite file's relative path is taken from ``storage``, never from the cwd."""
        if self.uri is None:
            return f"sqlite:///{storage / 'mlflow.db'}"
        file = sqlite_file(self.uri)
        return self.uri if file is None else f"sqlite:///{storage / file}"


class TrainingTrackingConfig(TrackingConfig):
    """What else a run that makes an adapter records."""

    registered_model: str | None = Field(
        "skip-vision",
        description="name the adapter is registered under as a model version; null = not at all",
    )
    alias: str = Field("candidate", description="alias that moves to the newly registered version")
    system_metrics_seconds: float = Field(
        10.0, ge=0, description="seconds between samples of CPU, memory, disk, network and GPU use; 0 = none"
    )


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

        return cls(uri, insist(begin, f"starting the run at {uri}", pauses=()))

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
                _unless_exists(lambda: client.create_registered_model(name))
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
        return insist(call, f"{doing} (run {self.run_id} at {self.uri})", pauses=(1.0, 4.0))

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
            _quieten()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                self.run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=self.uri
            )
            self._monitor.start()
        except Exception as error:
            warnings.warn(f"no system metrics: {_short(error)}", stacklevel=2)

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
            self._refused = _short(error)
            warnings.warn(
                f"MLflow at {self.uri} does not take metrics ({_short(error)}); the run goes on, and "
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


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store, relative where the URI is; None for other stores."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def is_registered(source: str) -> bool:
    """Whether an adapter is given as a model in MLflow's registry, and not as a folder."""
    return source.startswith("models:/")


def exact_model(uri: str, name: str) -> str:
    """``models:/NAME/VERSION`` of a registered model that is given so, or as ``models:/NAME@ALIAS``.

    Raises:
        ConfigError: it names no model, or none that MLflow has.
        TrackingError: MLflow does not say.
    """
    wanted = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([^/@]+))", name)
    if wanted is None:
        raise ConfigError(f"{name!r} names no model: write models:/NAME@ALIAS or models:/NAME/VERSION")
    model, alias, version = wanted.groups()

    def look_up() -> str:
        client = connect(uri, existing=True)
        found = (
            client.get_model_version_by_alias(model, alias)
            if alias
            else client.get_model_version(model, version)
        )
        return f"models:/{model}/{found.version}"

    try:
        return insist(look_up, f"looking for {name} at {uri}", pauses=())
    except TrackingError as error:
        if getattr(error.__cause__, "error_code", None) not in _NO_SUCH_MODEL:
            raise
        raise ConfigError(f"MLflow has no {name} at {uri}: {error.__cause__}") from error


def fetch_model(uri: str, name: str, folder: Path) -> str:
    """Put the files of a registered model into ``folder``; returns `exact_model` of its name.

    Files that are there already are not fetched again.
    """
    exact = exact_model(uri, name)
    note = folder / ".registered"

    def fetch() -> None:
        from mlflow.artifacts import download_artifacts

        source = connect(uri, existing=True).get_model_version_download_uri(
            *exact.removeprefix("models:/").split("/")
        )
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as copies:
            copy = Path(download_artifacts(artifact_uri=source, dst_path=copies, tracking_uri=uri))
            (copy / note.name).write_text(exact)
            copy.rename(folder)

    if not note.exists() or note.read_text() != exact:
        insist(fetch, f"fetching {name} from {uri}", pauses=())
    return exact


def rejected_rows(counts: Mapping[str, int]) -> dict[str, float]:
    """Counts of rejected rows by kind as metrics."""
    kinds = {f"rejected_rows/{kind}": float(count) for kind, count in counts.items()}
    return {**kinds, "rejected_rows": float(sum(counts.values()))}


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def connect(uri: str, *, existing: bool = False) -> MlflowClient:
    """A client of the tracking server and registry at ``uri``.

    Raises:
        ConfigError: with ``existing``, ``uri`` is a sqlite file that is not there; without, it is made.
    """
    _quieten()
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None:
        if existing and not file.exists():
            raise ConfigError(
                f"there is no {file}, in which MLflow's models were to be looked up: mend the address of "
                "MLflow, or the storage that it lies in"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _quieten() -> None:
    """Before MLflow is imported: what it says, to whom, and how long it keeps trying."""
    # Its own patience of several minutes per call would stop the training it watches.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def _experiment_id(client: MlflowClient, uri: str, name: str, artifacts: Path) -> str:
    if client.get_experiment_by_name(name) is None:
        # Without a server MLflow would put artifacts into the working directory.
        location = None if uri.startswith(("http://", "https://", "databricks")) else artifacts.as_uri()
        _unless_exists(lambda: client.create_experiment(name, artifact_location=location))
    return str(client.get_experiment_by_name(name).experiment_id)


def _unless_exists(create: Callable[[], object]) -> None:
    """Create something, or find that another job has done so in the meantime."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def insist(call: Callable[[], T], doing: str, pauses: tuple[float, ...]) -> T:
    """What ``call`` returns, tried again after each pause (seconds); `TrackingError` if it always fails.

    Settings that are wrong (`ConfigError`) are no failure of MLflow's.
    """
    for pause in (*pauses, None):
        try:
            return call()
        except ConfigError:
            raise
        # The stores behind the client raise their own errors as well as MLflow's.
        except Exception as error:
            if pause is None:
                raise TrackingError(f"MLflow failed at {doing}: {_short(error)}") from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
