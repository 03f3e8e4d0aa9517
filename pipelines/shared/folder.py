"""The folder of one job: which process works on it, which settings it was started with, and its result.

::

    <storage>/<name>/run.json       settings, MLflow run, and the result once the job is finished
                     lock           held by the process that works on the job
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from pipelines.shared.fields import section_defaults
from pipelines.shared.files import StorageError, is_storage_error, storage_error, write_text
from pipelines.shared.paths import real_paths
from pipelines.shared.sections import flatten
from skipvision.errors import ConfigError

_ABSENT = object()


class JobFolder:
    """Job ``name`` under ``storage``, new or resumed."""

    may_differ: ClassVar[frozenset[str]] = frozenset({"storage", "tracking"})
    """Dotted names of settings that do not change the result; a section's name covers all its fields."""

    hint: ClassVar[str] = ""
    """Added to the error when a job is started with different settings."""

    def __init__(self, storage: Path, name: str) -> None:
        self.storage, self.name = storage, name
        self.path = storage / name
        self._state: dict[str, Any] = {}
        self.changes: list[str] = []

    # ---------------------------------------------------------------------------------------- claim

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Claim the folder for this process, until the block or the process ends.

        A folder that is still empty is removed.

        Raises:
            ConfigError: another process has claimed it, or it cannot be written to.
            StorageError: an operation on a file of the job failed in the block.
        """
        created = [self.path, *(path for path in self.path.parents if not path.exists())]
        with self._locked() as lock:
            try:
                self._state = self._read()
                yield
            except OSError as error:
                raise self._explained(error) from error
            finally:
                with suppress(OSError):  # not empty, or not writable
                    lock.unlink(missing_ok=True)
                    for path in created:
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
                        f"job {self.name!r} in {self.storage} is in use by another process; wait for it, or "
                        "choose another name"
                    ) from None
                # The previous owner may have removed the file after we opened and before we locked it.
                if file.exists() and os.path.samestat(file.stat(), os.fstat(lock.fileno())):
                    yield file
                    return

    def _explained(self, error: OSError) -> OSError | StorageError:
        """Return a `StorageError` if the error is about the job's files; otherwise the error itself."""
        named = [Path(os.fsdecode(one)) for one in (error.filename2, error.filename) if one is not None]
        ours = [file for file in named if file.is_relative_to(self.storage)]
        if ours:  # of a copy, the second name is that of the new file
            return storage_error(error, ours[0])
        if named or not is_storage_error(error):
            return error
        return storage_error(error, f"files of {self.path}")

    # ------------------------------------------------------------------------------------- settings

    @property
    def has_work(self) -> bool:
        """Whether the folder holds work that must not be mixed with other settings or data."""
        return False

    @property
    def may_change(self) -> Collection[str]:
        """Settings that an unfinished job may be resumed with, if ``resume_with_changes`` is set."""
        return ()

    def resume(self, config: BaseModel, *, with_changes: bool = False) -> bool:
        """Return whether an earlier start of the job, with these settings, is resumed.

        An earlier start with other settings that has done no work is forgotten.

        Args:
            config: the settings, with paths as the user gave them.
            with_changes: accept other values of `may_change`; ``changes`` then lists them.

        Raises:
            ConfigError: the settings differ and work exists.
        """
        if "config" not in self.state:
            return False
        differences = self._differences(config)
        self.changes = [line.strip() for line in differences.values()]
        changeable = set(differences) <= set(self.may_change)
        if not differences or (self.has_work and with_changes and changeable):
            return True
        if self.has_work:
            resume = ", resume with these by --resume_with_changes true" if changeable else ""
            raise ConfigError(
                f"job {self.name!r} exists in {self.storage} with other settings:\n"
                + "\n".join(differences.values())
                + f"\nRestore them to resume{resume}, choose another name, or delete its folder"
                + self.hint
            )
        self.forget()
        self.changes = []
        return False

    def _differences(self, config: BaseModel) -> dict[str, str]:
        """Return a line for each setting that differs; paths to the same file are equal.

        A field that did not exist at the first start had its default.
        """
        settings = config.model_dump(mode="json")
        old, new = (comparable(one, self.may_differ) for one in (self.state["config"], settings))
        defaults = flatten(section_defaults(type(config)))
        old |= {name: defaults[name] for name in new.keys() & defaults.keys() if not _is_set(old, name)}
        old_paths, new_paths = self.state.get("paths", {}), real_paths(config)
        return {
            name: f"  {name}: was {_shown(old, name)}, now {_shown(new, name)}"
            for name in sorted({*old, *new})
            if old.get(name, _ABSENT) != new.get(name, _ABSENT)
            and not (name in new_paths and old_paths.get(name) == new_paths[name])
        }

    def require_same_files(self, files: Mapping[str, str]) -> None:
        """Check the fingerprints of the files that the job reads against those of its first start.

        Args:
            files: fingerprints by the files' names. They are ``files`` in ``run.json``.

        Raises:
            ConfigError: a file has changed and work exists.
        """
        known = self.state.get("files", {}) if self.has_work else {}
        for name, fingerprint in files.items():
            if known.get(name, fingerprint) != fingerprint:
                raise ConfigError(
                    f"{name} has changed since this job began ({known[name][:8]} then, {fingerprint[:8]} "
                    "now): restore it, or choose another name"
                )

    # ---------------------------------------------------------------------------------------- state

    @property
    def state(self) -> Mapping[str, Any]:
        """The content of ``run.json`` while the folder is claimed."""
        return self._state

    def remember(self, **values: Any) -> None:
        """Write JSON values to ``run.json``."""
        state = {**self._state, **values}
        write_text(self.path / "run.json", json.dumps(state, indent=2) + "\n")
        self._state = state

    def hold(self, **values: Any) -> None:
        """Set JSON values that the next `remember` writes, with its own."""
        self._state = {**self._state, **values}

    def forget(self) -> None:
        """Begin anew: the next `remember` writes only its own values and those held since."""
        self._state = {}

    def remember_settings(self, config: BaseModel, **values: Any) -> None:
        """Write the settings, and further values, to ``run.json``."""
        paths = {**real_paths(config), **self.state.get("paths", {})}
        self.remember(config=config.model_dump(mode="json"), paths=paths, **values)

    def _read(self) -> dict[str, Any]:
        file = self.path / "run.json"
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if "mlflow_run_id" in state and "tracking" in state.get("config", {}):
            state.setdefault("tracked_in", state["config"]["tracking"])  # written by an earlier version
        return state


def comparable(settings: Mapping[str, Any], may_differ: Collection[str]) -> dict[str, object]:
    """Return the settings that change a job's result, by dotted names."""
    return {
        name: value
        for name, value in flatten(settings).items()
        if not any(name == free or name.startswith(f"{free}.") for free in may_differ)
    }


def _is_set(values: Mapping[str, object], name: str) -> bool:
    """Return whether a dotted name, or a section that contains it, has a value."""
    parts = name.split(".")
    return any(".".join(parts[: depth + 1]) in values for depth in range(len(parts)))


def _shown(values: Mapping[str, object], name: str) -> str:
    return json.dumps(values[name]) if name in values else "(not set)"
