"""The folder of one job: who is using it, what it was started with, what came out.

::

    <storage>/<name>/run.json       configuration, MLflow run, result once there is one
                     lock           held by the process that works on the job, while it does
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from pipelines.shared.files import write_text
from pipelines.shared.paths import input_path
from pipelines.shared.sections import flatten
from pipelines.tracking.config import TrackingConfig
from skipvision.errors import ConfigError

_ABSENT = object()


class JobFolder:
    """Job ``name`` under ``storage``, new or resumed."""

    may_differ: ClassVar[frozenset[str]] = frozenset()
    """Settings that do not change what a run computes, by dotted names; a section's is for all of it."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Settings that are the same if they lead to the same file."""

    advice: ClassVar[str] = ""
    """What else to say to whom other settings are refused."""

    def __init__(self, storage: Path, name: str) -> None:
        self.storage, self.name = storage, name
        self.path = storage / name
        self.state: dict[str, Any] = {}
        self.changes: list[str] = []

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder, for this process alone; the claim ends with the process, however that ends.

        A folder that nothing was put into is gone afterwards.
        """
        made = [self.path, *(path for path in self.path.parents if not path.exists())]
        with self._locked() as lock:
            try:
                self.state = self._read()
                yield
            finally:
                lock.unlink(missing_ok=True)
                with suppress(OSError):  # there is something in it
                    for path in made:
                        path.rmdir()

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        file = self.path / "lock"
        while True:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = file.open("w")
            except OSError as error:
                raise ConfigError(f"storage = {self.storage}: cannot write to {self.path}: {error}") from None
            with lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise ConfigError(
                        f"run {self.name!r} in {self.storage} is being worked on by another job; wait for "
                        "it, or choose another name"
                    ) from None
                # A job that ended just now may have taken the file away between our opening and locking it.
                if file.exists() and os.path.samestat(file.stat(), os.fstat(lock.fileno())):
                    yield file
                    return

    def resumes(self, config: Mapping[str, Any], *, with_changes: bool = False) -> bool:
        """Whether something was done already; a run with other settings is refused, unless nothing was.

        Args:
            config: the settings, paths as they were given.
            with_changes: those of ``may_change`` may differ in an unfinished run; ``changes`` lists them.
        """
        if not self.state:
            return False
        old, new = (comparable(settings, self.may_differ) for settings in (self.state["config"], config))
        known = self.state.get("paths", {})
        differing = {
            name: f"  {name}: was {_shown(old, name)}, now {_shown(new, name)}"
            for name in sorted({*old, *new})
            if old.get(name, _ABSENT) != new.get(name, _ABSENT)
            and not (name in self.paths and known.get(name, _ABSENT) == meant(new.get(name)))
        }
        self.changes = [line.strip() for line in differing.values()]
        changeable = set(differing) <= set(self.may_change)
        if not differing or (self.begun and with_changes and changeable):
            return True
        if self.begun:
            also = ", resume it with these by --resume_with_changes true" if changeable else ""
            raise ConfigError(
                f"run {self.name!r} exists in {self.storage} with other settings:\n"
                + "\n".join(differing.values())
                + f"\nSet them back to resume it{also}, choose another name, or delete its folder"
                + self.advice
            )
        self.state, self.changes = {}, []
        return False

    def insist_on_same(self, files: Mapping[str, str]) -> None:
        """Raise `ConfigError` if files, by name with their fingerprints, are not those this run began with.

        They are in ``run.json`` as ``files``. A run that has done nothing yet begins with what is there now.
        """
        known = self.state.get("files", {}) if self.begun else {}
        for name, fingerprint in files.items():
            if known.get(name, fingerprint) != fingerprint:
                raise ConfigError(
                    f"{name} has changed since this job began ({known[name][:8]} then, {fingerprint[:8]} "
                    "now): restore it, or choose another name"
                )

    def tracks(self, tracking: TrackingConfig) -> bool:
        """Whether these are the settings under which the run is in MLflow."""
        known = self.state.get("tracked_in") or self.state.get("config", {}).get("tracking")
        return known in (None, tracking.model_dump())

    def tracked(self, tracking: TrackingConfig, name: str) -> Any:
        """What `remember_tracked` was given under ``name``; None if the settings name another MLflow now."""
        return self.state.get(name) if self.tracks(tracking) else None

    def finished_already(self, tracking: TrackingConfig, result: Path) -> str:
        """What to say of a run that has its result, and of which nothing is recorded again."""
        elsewhere = "" if self.tracks(tracking) else "; it was recorded with other `tracking`, and not again"
        return f"{self.name!r} is finished already: {result}{elsewhere}"

    def remember_tracked(self, tracking: TrackingConfig, **runs: Any) -> None:
        """Write values to ``run.json`` that hold in this MLflow and experiment, as the ids of runs do."""
        self.remember(tracked_in=tracking.model_dump(), **runs)

    @property
    def begun(self) -> bool:
        """Whether some work is done that other settings or data would mix with."""
        raise NotImplementedError

    @property
    def may_change(self) -> Collection[str]:
        """Settings with which an unfinished job may go on if that is asked for."""
        return ()

    def remember(self, **values: Any) -> None:
        """Write to ``run.json``; values are JSON."""
        state = {**self.state, **values}
        write_text(self.path / "run.json", json.dumps(state, indent=2) + "\n")
        self.state = state

    def _read(self) -> dict[str, Any]:
        file = self.path / "run.json"
        state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return state


def meant(path: Any) -> Any:
    """The real path of an input; what leads nowhere here, or to a URL, stays as it is."""
    if path is None or "://" in path:
        return path
    try:
        return os.path.realpath(input_path(path, ""))
    except ConfigError:
        return path


def comparable(config: Mapping[str, Any], may_differ: Collection[str]) -> dict[str, object]:
    """The settings that change what a run computes, by dotted names."""
    return {
        name: value
        for name, value in flatten(config).items()
        if not any(name == free or name.startswith(f"{free}.") for free in may_differ)
    }


def _shown(values: Mapping[str, object], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not there"
