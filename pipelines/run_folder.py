"""The folder of one run: who is using it, what it was started with, what came out.

::

    <storage>/<name>/run.json       configuration, data fingerprint, MLflow run, result once there is one
                     lock           held by the job that works on the run, while it does
                     rows.json      which rows the run trains and is evaluated on
                     rejects.jsonl  rows that could not be used
                     checkpoints/   Ray Train's
                     adapter/       the result
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.tracking import flatten
from skipvision.errors import ConfigError

MAY_DIFFER = ("scaling", "storage")
"""Settings that do not change what a run computes."""


_ABSENT = object()


class RunFolder:
    """Run ``name`` under ``storage``, new or resumed."""

    def __init__(self, storage: Path, name: str) -> None:
        self.storage, self.name = storage, name
        self.path = storage / name
        self.rows = self.path / "rows.json"
        self.rejects = self.path / "rejects.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.state: dict[str, Any] = {}

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

    def resumes(self, config: Mapping[str, Any]) -> bool:
        """Whether something was done already; a run with other settings is refused, unless nothing was."""
        if not self.state:
            return False
        old, new = flatten(_comparable(self.state["config"])), flatten(_comparable(config))
        differing = [
            f"  {name}: was {_shown(old, name)}, now {_shown(new, name)}"
            for name in sorted({*old, *new})
            if old.get(name, _ABSENT) != new.get(name, _ABSENT)
        ]
        if differing and self.begun:
            raise ConfigError(
                f"run {self.name!r} exists in {self.storage} with other settings:\n"
                + "\n".join(differing)
                + "\nSet them back to resume it, choose another name, or delete its folder"
            )
        if differing:
            self.state = {}
        return not differing

    @property
    def begun(self) -> bool:
        """Whether some training is done that other settings or data would mix with."""
        return "trained" in self.state or any(self.checkpoints.glob("checkpoint_*"))

    def remember(self, **values: Any) -> None:
        """Write to ``run.json``; values are JSON."""
        state = {**self.state, **values}
        partial = self.path / ".run.json.partial"
        partial.write_text(json.dumps(state, indent=2) + "\n")
        partial.replace(self.path / "run.json")
        self.state = state

    def _read(self) -> dict[str, Any]:
        file = self.path / "run.json"
        state: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return state


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in MAY_DIFFER}


def _shown(values: Mapping[str, object], name: str) -> str:
    return json.dumps(values[name]) if name in values else "not there"
