"""``rejects.jsonl``: the unusable rows of a run, one JSON object a line, each row once with its data sets.

`pipelines.data.training_rows` writes the rows that are unusable from the start. Rows whose images become
unreadable during the run are appended here, by the worker that meets them first.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path

from pipelines.data.images import ImageError
from pipelines.data.rows import DataSet, Reject, TrainingRow
from pipelines.shared.console import say
from pipelines.shared.files import storage_errors
from skipvision.errors import DataError


def listed_once(rejects: Mapping[DataSet, Sequence[Reject]]) -> list[Reject]:
    """Return the rejects of several data sets, each row once: data sets may share a file."""
    merged: dict[str, Reject] = {}
    for data_set, rows in rejects.items():
        for row in rows:
            seen = merged.get(row.source, row)
            merged[row.source] = dataclasses.replace(seen, data_sets=(*seen.data_sets, data_set))
    return list(merged.values())


class LateRejects:
    """Handles rows whose images became unreadable after the check.

    A call with a row and its error appends the row to ``file``, once. It then returns, to leave the row out,
    or raises `DataError` if ``stop`` is true. Several processes may share the file. A `StorageError` says
    that it cannot be written.
    """

    def __init__(self, file: Path, data_sets: tuple[DataSet, ...], *, stop: bool) -> None:
        self.file, self.data_sets, self.stop = file, data_sets, stop
        self._seen: set[tuple[str, str]] = set()
        self._read_to = 0

    def __call__(self, row: TrainingRow, error: ImageError) -> None:
        new = self._add(Reject(row.source, row.key, error.kind, str(error), self.data_sets))
        if self.stop:
            raise DataError(
                f"{row.source} ({row.key}) became unusable during the run: {error}. Fix it, or set "
                f"data.on_bad_row to skip; it is listed in {self.file}"
            )
        if new:
            say(f"left out: {row.source} ({row.key}): {error}")

    def _add(self, reject: Reject) -> bool:
        """Add the row to the file; return False if the file has it already."""
        identity = (reject.source, reject.key)
        if identity in self._seen:
            return False
        with storage_errors(self.file), self.file.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read_to)
            self._seen |= {(line["source"], line["key"]) for line in map(json.loads, file)}
            if new := identity not in self._seen:
                _append(file, json.dumps(dataclasses.asdict(reject), ensure_ascii=False).encode() + b"\n")
                self._seen.add(identity)
            self._read_to = file.tell()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not: a process forked meanwhile holds it, too
        return new


def _append(file: FileIO, line: bytes) -> None:
    """Write a whole line at the end of a file, or nothing: half a line would end every later read."""
    end = file.seek(0, os.SEEK_END)
    try:
        written = 0
        while written < len(line):
            written += file.write(line[written:])
    except OSError:
        file.truncate(end)
        raise


def count_rejects(file: Path) -> dict[str, int]:
    """Return the number of rows of each kind in a rejects file; empty if it does not exist."""
    if not file.exists():
        return {}
    with file.open(encoding="utf-8") as lines:
        return dict(Counter(json.loads(line)["kind"] for line in lines).most_common())


def rejected_rows(counts: Mapping[str, int]) -> dict[str, float]:
    """Return counts of rejected rows by kind as metrics."""
    kinds = {f"rejected_rows/{kind}": float(count) for kind, count in counts.items()}
    return {**kinds, "rejected_rows": float(sum(counts.values()))}
