"""Versions of registered models: find one by a name, see and move the aliases, fetch the files."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipelines.tracking.client import TrackingError, connect, with_retries
from skipvision.errors import ConfigError, SkipVisionError

T = TypeVar("T")

_NO_SUCH_MODEL = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's error codes for unknown names, versions and aliases."""

_VERSION = re.compile(r"models:/(?P<model>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_RUN = re.compile(r"runs:/(?P<run>[^/]+)")


class AliasMovedError(SkipVisionError):
    """Another client has moved an alias since it was read."""


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}"


class Registry:
    """MLflow's model registry at ``uri``.

    All methods raise `TrackingError` when MLflow does not answer.
    """

    def __init__(self, uri: str) -> None:
        """Raises `ConfigError` if ``uri`` is a sqlite file that does not exist."""
        self.uri = uri
        self._client = connect(uri, existing=True)

    def find(self, name: str) -> ModelVersion:
        """Return the version named ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or ``runs:/RUN_ID``.

        Raises:
            ConfigError: no such version exists, or the run registered several.
        """
        if run := _RUN.fullmatch(name):
            return self._registered_by(run["run"])
        match = _VERSION.fullmatch(name)
        if match is None:
            raise ConfigError(
                f"{name!r} names no model version: write models:/NAME/VERSION, models:/NAME@ALIAS or "
                "runs:/RUN_ID"
            )
        model, alias, version = match["model"], match["alias"], match["version"]
        if alias is not None:
            version = self.holder(model, alias)
            if version is None:
                raise ConfigError(f"{name}: no version of {model!r} at {self.uri} has the alias {alias!r}")
        filter_ = f"name = '{model}' and version_number = {version}"
        if not self._call(f"looking for {name}", lambda: self._client.search_model_versions(filter_)):
            raise ConfigError(f"{name}: the registry at {self.uri} has no such version")
        return ModelVersion(model, version)

    def holder(self, model: str, alias: str) -> str | None:
        """Return the version of ``model`` that has the alias, or None."""
        models = self._call(
            f"looking for {model}",
            lambda: self._client.search_registered_models(f"name = '{model}'"),
        )
        return next((str(entry.aliases[alias]) for entry in models if alias in entry.aliases), None)

    def move(self, alias: str, to: ModelVersion, *, expected: str | None) -> None:
        """Give ``to`` the alias if version ``expected`` (None: no version) still has it.

        MLflow has no atomic operation for this: another client may move the alias between check and move.

        Raises:
            AliasMovedError: a different version has the alias.
        """
        now = self.holder(to.name, alias)
        if now != expected:
            raise AliasMovedError(
                f"the alias {alias!r} of {to.name!r} moved from {_holder_name(expected)} to "
                f"{_holder_name(now)} since the comparison: run the job again"
            )
        self._call(
            f"moving {alias} to {to}",
            lambda: self._client.set_registered_model_alias(to.name, alias, to.version),
        )

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags of one model version; existing tags of the same name are replaced."""
        for key, value in tags.items():
            write = partial(self._client.set_model_version_tag, version.name, version.version, key, value)
            self._call(f"setting the tag {key} of {version}", write)

    def fetch(self, version: ModelVersion, folder: Path) -> None:
        """Download a version's files into ``folder``."""
        fetch_model(self.uri, str(version), folder)

    def artifact(self, run_id: str, name: str, folder: Path) -> Path:
        """Download an artifact of a run into ``folder`` and return its path."""
        return Path(
            self._call(
                f"fetching {name} of run {run_id}",
                lambda: self._client.download_artifacts(run_id, name, str(folder)),
            )
        )

    def metrics(self, version: ModelVersion) -> tuple[str, dict[str, float]]:
        """Return the id and the last metrics of the run that registered a version; "" without a run."""

        def look_up() -> tuple[str, dict[str, float]]:
            run_id = self._client.get_model_version(version.name, version.version).run_id
            return (run_id, dict(self._client.get_run(run_id).data.metrics)) if run_id else ("", {})

        return self._call(f"reading the metrics of {version}", look_up)

    def _registered_by(self, run_id: str) -> ModelVersion:
        versions = self._call(
            f"looking for the model of run {run_id}",
            lambda: self._client.search_model_versions(f"run_id = '{run_id}'"),
        )
        if len(versions) != 1:
            names = ", ".join(f"models:/{one.name}/{one.version}" for one in versions)
            raise ConfigError(
                f"runs:/{run_id}: the run registered {names}; name one of them"
                if versions
                else f"runs:/{run_id}: the run at {self.uri} registered no model version"
            )
        return ModelVersion(versions[0].name, str(versions[0].version))

    def _call(self, action: str, call: Callable[[], T]) -> T:
        return with_retries(call, f"{action} at {self.uri}", pauses=(1.0, 4.0))


def _holder_name(version: str | None) -> str:
    return "no version" if version is None else f"version {version}"


def is_registered(source: str) -> bool:
    """Return whether an adapter is a model in MLflow's registry rather than a folder."""
    return source.startswith("models:/")


def exact_model(uri: str, name: str) -> str:
    """Return ``models:/NAME/VERSION`` for that name or for ``models:/NAME@ALIAS``.

    Raises:
        ConfigError: the name is malformed, or MLflow does not have the model.
        TrackingError: MLflow does not answer.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/([^/@]+))", name)
    if match is None or not {".", ".."}.isdisjoint(match.groups()):
        raise ConfigError(f"{name!r} names no model: write models:/NAME@ALIAS or models:/NAME/VERSION")
    model, alias, version = match.groups()

    def look_up() -> str:
        client = connect(uri, existing=True)
        found = (
            client.get_model_version_by_alias(model, alias)
            if alias
            else client.get_model_version(model, version)
        )
        return f"models:/{model}/{found.version}"

    try:
        return with_retries(look_up, f"looking for {name} at {uri}", pauses=())
    except TrackingError as error:
        if getattr(error.__cause__, "error_code", None) not in _NO_SUCH_MODEL:
            raise
        raise ConfigError(f"MLflow has no {name} at {uri}: {error.__cause__}") from error


def fetch_model(uri: str, name: str, folder: Path) -> str:
    """Download a registered model into ``folder`` and return its `exact_model` name.

    A version that is in the folder already is not downloaded again.
    """
    exact = exact_model(uri, name)
    marker = folder / ".registered"

    def fetch() -> None:
        from mlflow.artifacts import download_artifacts

        source = connect(uri, existing=True).get_model_version_download_uri(
            *exact.removeprefix("models:/").split("/")
        )
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as copies:
            copy = Path(download_artifacts(artifact_uri=source, dst_path=copies, tracking_uri=uri))
            (copy / marker.name).write_text(exact)
            copy.rename(folder)

    if not marker.exists() or marker.read_text() != exact:
        with_retries(fetch, f"fetching {name} from {uri}", pauses=())
    return exact
