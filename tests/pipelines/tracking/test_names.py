"""Names that MLflow refuses are refused with the settings, by every job that gives names to MLflow."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from pipelines.demo import DemoConfig, run_demo
from pipelines.finetune.config import FinetuneConfig
from pipelines.promote.config import PromoteConfig
from pipelines.shared.config import load_config
from pipelines.tracking.client import connect
from pipelines.tracking.config import TrackedConfig
from pipelines.tracking.names import AliasName, ExperimentName, ModelName
from pipelines.tracking.registry import ModelVersion, Registry
from skipvision.errors import ConfigError

GOOD = {
    "alias": ["champion", "a", "v", "v2a", "2", "2v", "latest-1", "my_alias-3", "été"],
    "model": ["skip-vision", "a", "été #1 100%", "a.b", ".a", "latest", "v2", "a b", "x" * 255],
    "experiment": ["skip-vision", "a/b", "a:b", 'it\'s "so"', "latest", "été #1", "x" * 255],
}
REFUSED_BY_MLFLOW = {
    "alias": ["", "latest", "LATEST", "v2", "V10", "a b", "a/b", "a:b", "a@b", "../x", "a.b", "x" * 256],
    "model": ["", " ", "a/b", "a:b", "/", "../x", ".", "..", "..."],
    "experiment": [""],
}
REFUSED_BY_US = {
    "alias": ["a\n", "latest\n"],  # MLflow's pattern allows a line break at the end
    "model": ["a@b", "a?b", "it's", '"a"', "a\nb", "x" * 256],  # such a version cannot be found by its name
    "experiment": [" ", "a\nb", "x" * 257],
}
TYPES = {
    kind: TypeAdapter(type_)
    for kind, type_ in {"alias": AliasName, "model": ModelName, "experiment": ExperimentName}.items()
}


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(kind, name) for kind, names in table.items() for name in names]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('storage') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def version(uri: str) -> str:
    client = connect(uri)
    client.create_registered_model("ours")
    return str(client.create_model_version("ours", "file:///nowhere").version)


@functools.cache
def mlflow_refusal(uri: str, kind: str, name: str) -> str | None:
    """Return MLflow's words when it refuses a name."""
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    try:
        if kind == "alias":
            client.set_registered_model_alias("ours", name, "1")
        elif kind == "model":
            client.create_registered_model(name)
        else:
            client.create_experiment(name)
    except MlflowException as error:
        return str(error)
    return None


@pytest.mark.parametrize(("kind", "name"), pairs(GOOD))
def test_names_that_mlflow_accepts(uri, version, kind, name):
    assert TYPES[kind].validate_python(name) == name
    assert mlflow_refusal(uri, kind, name) is None
    if kind == "model":
        client = connect(uri)
        client.create_model_version(name, "file:///nowhere")
        client.set_registered_model_alias(name, "champion", "1")
        assert Registry(uri).find(f"models:/{name}@champion") == ModelVersion(name, "1")


@pytest.mark.parametrize(("kind", "name"), pairs(REFUSED_BY_MLFLOW))
def test_names_that_mlflow_refuses(uri, version, kind, name):
    assert mlflow_refusal(uri, kind, name) is not None
    with pytest.raises(ValidationError):
        TYPES[kind].validate_python(name)


@pytest.mark.parametrize(("kind", "name"), pairs(REFUSED_BY_US))
def test_names_that_nothing_could_find_again(kind, name):
    with pytest.raises(ValidationError):
        TYPES[kind].validate_python(name)


FINETUNE = ["--name", "a", "--model.path", "m", "--data.train", "t.json"]
PROMOTE = ["--candidate.model", "models:/a/1", "--candidate.items", "a", "--reference.items", "b"]
SETTINGS = [
    (FinetuneConfig, FINETUNE, "--tracking.alias", "latest"),
    (FinetuneConfig, FINETUNE, "--tracking.alias", "v2"),
    (FinetuneConfig, FINETUNE, "--tracking.registered_model", "team/model"),
    (FinetuneConfig, FINETUNE, "--tracking.experiment", ""),
    (PromoteConfig, PROMOTE, "--alias", "latest"),
    (PromoteConfig, PROMOTE, "--tracking.experiment", ""),
]


@pytest.mark.parametrize(("model", "argv", "field", "value"), SETTINGS)
def test_jobs_refuse_them_with_their_settings(model, argv, field, value):
    with pytest.raises(ConfigError, match=field.removeprefix("--")):
        load_config(model, [*argv, field, value], description=None)


def test_the_remedy_is_named():
    argv = [*FINETUNE, "--tracking.alias", "v2", "--tracking.registered_model", "team/model"]
    with pytest.raises(ConfigError) as caught:
        load_config(FinetuneConfig, argv, description=None)
    message = str(caught.value)
    assert "tracking.alias = 'v2': MLflow reserves `latest`, and `v` with a number" in message
    assert (
        "tracking.registered_model = 'team/model': a registered model's name must not contain '/'" in message
    )


def test_every_job_that_is_recorded_checks_its_experiment():
    assert TrackedConfig.model_validate({"name": "a"}).tracking.experiment == "skip-vision"
    with pytest.raises(ValidationError, match="should not be empty"):
        TrackedConfig.model_validate({"name": "a", "tracking": {"experiment": ""}})


@pytest.mark.parametrize(
    "override",
    [["--tracking.alias", "latest"], ["--tracking.registered_model", "a/b"], ["--training.typo", "1"]],
)
def test_the_demo_checks_its_overrides_before_it_starts_ray(tmp_path: Path, monkeypatch, override):
    def started() -> None:
        raise AssertionError("Ray is started")

    monkeypatch.setattr("pipelines.demo.local_ray", started)
    with pytest.raises(ConfigError, match=override[0].removeprefix("--")):
        run_demo(DemoConfig(storage=tmp_path, overrides=override))
