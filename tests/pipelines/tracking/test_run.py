"""MLflow: values are recorded, runs continue after a restart, and nothing is lost while it is away."""

from __future__ import annotations

import ast
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.shared.sections import flatten
from pipelines.tracking.client import TrackingError
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.registry import Registry, fetch_model
from pipelines.tracking.run import Tracker
from skipvision.errors import ConfigError

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def uri(storage: Path) -> str:
    return TrackingConfig().absolute_uri(storage)


def begin(uri: str, storage: Path, run_id: str | None = None) -> Tracker:
    return Tracker.start(
        uri, experiment="tests", run_name="run", artifacts=storage / "artifacts", run_id=run_id
    )


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def no_metrics(uri: str) -> Iterator[None]:
    """A sqlite store that refuses metrics."""
    file = uri.removeprefix("sqlite:///")
    for statement in (
        "CREATE TRIGGER full BEFORE INSERT ON metrics BEGIN SELECT RAISE(ABORT, 'no metrics'); END",
        "DROP TRIGGER full",
    ):
        with sqlite3.connect(file) as database:
            database.execute(statement)
        database.close()
        if statement.startswith("CREATE"):
            yield


def test_only_tracking_imports_mlflow_and_only_inside_functions():
    root = Path(__file__).parents[3]
    folders = [root / name for name in ("skipvision", "pipelines", "serve", "jobs")]
    for file in [file for folder in folders for file in folder.rglob("*.py")]:
        imports = [
            n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        names = {getattr(n, "module", None) or n.names[0].name for n in imports}
        if any(name.split(".")[0] == "mlflow" for name in names):
            assert file.parent == root / "pipelines" / "tracking"
            assert all(n.col_offset for n in imports if (getattr(n, "module", "") or "").startswith("mlflow"))


def test_a_sqlite_store_is_always_absolute(tmp_path):
    assert TrackingConfig().absolute_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert TrackingConfig(uri="sqlite:///my.db").absolute_uri(tmp_path) == f"sqlite:///{tmp_path}/my.db"
    assert TrackingConfig(uri="sqlite:////a/b.db").absolute_uri(tmp_path) == "sqlite:////a/b.db"
    assert TrackingConfig(uri="http://server:5000").absolute_uri(tmp_path) == "http://server:5000"


def test_nested_settings_become_dotted_names():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1]}) == {"a.b.c": 1, "a.d": None, "e": [1]}


def test_a_run_is_recorded_and_continues_under_its_id(uri, storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = begin(uri, storage)
    tracker.parameters({"lora": {"rank": 16}, **{f"p{i}": i for i in range(150)}})
    tracker.text("a: 1\n", "config.yaml")
    for step in range(1, 4):
        tracker.metrics({"loss": 1 / step, "lr": 0.1}, step)
    assert tracker.close() == 0

    again = begin(uri, storage, tracker.run_id)
    again.watch_system(0.05)
    again.metrics({"loss": 0.2}, 4)
    time.sleep(0.4)
    again.close()
    again.finish("FINISHED")

    run = client(uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.rank"] == "16"
    assert len(run.data.params) == 151
    assert [m.step for m in client(uri).get_metric_history(tracker.run_id, "loss")] == [1, 2, 3, 4]
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    assert [f.path for f in client(uri).list_artifacts(tracker.run_id)] == ["config.yaml"]
    assert list(tmp_path.iterdir()) == []  # nothing is written to the working directory
    assert any((storage / "artifacts").rglob("config.yaml"))


def test_an_adapter_becomes_one_version_with_the_alias(uri, storage, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_text("1")
    for number in ("1", "2"):
        tracker = begin(uri, storage)
        assert tracker.register(adapter, "ours", "candidate") == number
        assert tracker.register(adapter, "ours", "candidate") == number  # registered twice, one version
        version = client(uri).get_model_version_by_alias("ours", "candidate")
        assert (str(version.version), version.run_id) == (number, tracker.run_id)
        assert [f.path for f in client(uri).list_artifacts(tracker.run_id, "adapter")] == ["adapter/weights"]


def test_an_unreachable_server_is_an_error_at_the_start(storage):
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"starting the run at http://127.0.0.1:9"):
        begin(NOBODY, storage)
    assert time.monotonic() - started < 30


class Flaky:
    """A client whose server is away from time to time."""

    def __init__(self) -> None:
        self.away, self.received = False, []

    def log_batch(self, run_id, metrics):
        if self.away:
            raise ConnectionError("nobody there")
        self.received += [(metric.key, metric.step) for metric in metrics]


def test_metrics_wait_while_the_server_is_away(monkeypatch):
    flaky = Flaky()
    monkeypatch.setattr(Tracker, "_client", flaky)
    tracker = Tracker("http://server", "run", flush_seconds=0, retry_seconds=0.2)
    tracker.metrics({"loss": 1.0}, 1)
    flaky.away = True
    with pytest.warns(UserWarning, match="1 values wait for the next try"):
        tracker.metrics({"loss": 1.0}, 2)
    tracker.metrics({"loss": 1.0}, 3)  # during the pause MLflow is not called and nothing is delayed
    assert flaky.received == [("loss", 1)]
    flaky.away = False
    time.sleep(0.25)
    tracker.metrics({"loss": 1.0}, 4)
    assert flaky.received == [("loss", step) for step in (1, 2, 3, 4)]
    assert tracker.close() == 0


def test_values_that_a_server_never_took_are_counted(monkeypatch):
    flaky = Flaky()
    flaky.away = True
    monkeypatch.setattr(Tracker, "_client", flaky)
    tracker = Tracker("http://server", "run")
    with pytest.warns(UserWarning, match="does not take metrics"):
        tracker.metrics({"loss": 1.0, "lr": 1.0}, 1)
    with pytest.warns(UserWarning, match="does not take metrics"):
        assert tracker.close() == 2
    with (
        pytest.warns(UserWarning, match="does not take metrics"),
        pytest.raises(TrackingError, match="did not take 2 values of run run: ConnectionError: nobody"),
    ):
        tracker.finish("FINISHED")


def test_metrics_of_any_name_are_recorded(uri, storage):
    tracker = begin(uri, storage)
    names = ["a/http://x", "a/b/", "a/./b", "..", "/a", "a:b", "a?b", "ä b", "", "x" * 300, "x" * 299 + "/y"]
    tracker.metrics({name: number for number, name in enumerate(names)}, 0)
    tracker.finish("FINISHED")
    found = client(uri).get_run(tracker.run_id).data.metrics
    assert sorted(found.values()) == list(range(len(names)))
    assert found["a/http_/_/x"] == 0
    assert {found["a_b"], found["a_b_"]} == {5, 6}


def test_reading_creates_no_registry(tmp_path):
    uri = TrackingConfig().absolute_uri(tmp_path / "typo")
    with pytest.raises(ConfigError, match=r"there is no .*typo/mlflow\.db.* correct the address"):
        Registry(uri)
    with pytest.raises(ConfigError, match=r"there is no .*typo/mlflow\.db"):
        fetch_model(uri, "models:/ours@champion", tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_registration_that_fails_is_retried_and_then_reported(monkeypatch, tmp_path):
    tries = []
    monkeypatch.setattr(Tracker, "_client", property(lambda self: tries.append(1) or 1 / 0))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(TrackingError, match=r"registering .*adapter as ours \(run r at http://server\)"):
        Tracker("http://server", "r").register(tmp_path / "adapter", "ours", "candidate")
    assert len(tries) == 3
