"""Versions of registered models: which one a name means, who holds an alias, and moving it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipelines.tracking.run import connect, fetch_model, insist
from skipvision.errors import ConfigError, SkipVisionError

T = TypeVar("T")

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
        return insist(call, f"{doing} at {self.uri}", pauses=(1.0, 4.0))


def _called(version: str | None) -> str:
    return "nobody" if version is None else f"version {version}"
