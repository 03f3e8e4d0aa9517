"""Versions of registered models: which one a name means, who holds an alias, and moving it."""

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
"""MLflow's codes for names, versions and aliases that it does not know."""

_VERSION = re.compile(r"models:/(?P<model>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_RUN = re.compile(r"runs:/(?P<run>[^/]+)")


class AliasMovedError(SkipVisionError):
    """Somebody else has moved an alias in the meantime."""


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
        """Raises `ConfigError` if ``uri`` is a sqlite file that is not there."""
        self.uri = uri
        self._client = connect(uri, existing=True)

    def find(self, name: str) -> ModelVersion:
        """The version that ``models:/NAME/VERSION``, ``models:/NAME@ALIAS`` or ``runs:/RUN_ID`` means.

        Raises:
            ConfigError: it means none, or a run that registered several.
        """
        if run := _RUN.fullmatch(name):
            return self._registered_by(run["run"])
        wanted = _VERSION.fullmatch(name)
        if wanted is None:
            raise ConfigError(
                f"{name!r} names no model version: write models:/NAME/VERSION, models:/NAME@ALIAS or "
                "runs:/RUN_ID"
            )
        model, alias, version = wanted["model"], wanted["alias"], wanted["version"]
        if alias is not None:
            version = self.holder(model, alias)
            if version is None:
                raise ConfigError(f"{name}: no version of {model!r} at {self.uri} has the alias {alias!r}")
        filter_ = f"name = '{model}' and version_number = {version}"
        if not self._ask(f"looking for {name}", lambda: self._client.search_model_versions(filter_)):
            raise ConfigError(f"{name}: the registry at {self.uri} has no such version")
        return ModelVersion(model, version)

    def holder(self, model: str, alias: str) -> str | None:
        """The version of ``model`` that has the alias now, if one has."""
        found = self._ask(
            f"looking for {model}",
            lambda: self._client.search_registered_models(f"name = '{model}'"),
        )
        return next((str(entry.aliases[alias]) for entry in found if alias in entry.aliases), None)

    def move(self, alias: str, to: ModelVersion, *, expected: str | None) -> None:
        """Give ``to`` the alias, provided that ``expected`` still holds it.

        The registry has no such operation: between looking and moving a moment remains.

        Raises:
            AliasMovedError: another version holds it.
        """
        now = self.holder(to.name, alias)
        if now != expected:
            raise AliasMovedError(
                f"the alias {alias!r} of {to.name!r} moved from {_called(expected)} to {_called(now)} in the "
                "meantime, against which nothing was compared: run the job again"
            )
        self._ask(
            f"moving {alias} to {to}",
            lambda: self._client.set_registered_model_alias(to.name, alias, to.version),
        )

    def note(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Tag a version."""
        for key, value in tags.items():
            write = partial(self._client.set_model_version_tag, version.name, version.version, key, value)
            self._ask(f"noting {key} on {version}", write)

    def fetch(self, version: ModelVersion, folder: Path) -> None:
        """Put a version's files into ``folder``."""
        fetch_model(self.uri, str(version), folder)

    def artifact(self, run_id: str, name: str, folder: Path) -> Path:
        """A copy, in ``folder``, of an artifact of a run."""
        return Path(
            self._ask(
                f"fetching {name} of run {run_id}",
                lambda: self._client.download_artifacts(run_id, name, str(folder)),
            )
        )

    def _registered_by(self, run_id: str) -> ModelVersion:
        found = self._ask(
            f"looking for the model of run {run_id}",
            lambda: self._client.search_model_versions(f"run_id = '{run_id}'"),
        )
        if len(found) != 1:
            names = ", ".join(f"models:/{one.name}/{one.version}" for one in found)
            raise ConfigError(
                f"runs:/{run_id}: the run registered {names}; name one of them"
                if found
                else f"runs:/{run_id}: the run at {self.uri} registered no model version"
            )
        return ModelVersion(found[0].name, str(found[0].version))

    def _ask(self, doing: str, call: Callable[[], T]) -> T:
        return with_retries(call, f"{doing} at {self.uri}", pauses=(1.0, 4.0))


def _called(version: str | None) -> str:
    return "nobody" if version is None else f"version {version}"


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
        return with_retries(look_up, f"looking for {name} at {uri}", pauses=())
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
        with_retries(fetch, f"fetching {name} from {uri}", pauses=())
    return exact
