"""``rejects.jsonl``: the rows of a run that could not be used, one JSON object a line, each row once.

Rows that cannot be used from the start are written by `pipelines.data.training_rows`. Rows whose images
become unreadable later are added here, by whichever worker meets them first.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pipelines.data.images import ImageError
from pipelines.data.rows import Reject, TrainingRow
from skipvision.errors import DataError


class LateRejects:
    """What becomes of rows of one data set whose images have become unreadable since they were checked.

    Called with a row and its error: the row is added to ``file``, unless it stands there already, and is
    left out this time; with ``stop`` that is a `DataError`. Several processes may share the file.
    """

    def __init__(self, file: Path, source: str, *, stop: bool) -> None:
        self.file, self.source, self.stop = file, source, stop
        self._seen: set[tuple[str, str]] = set()
        self._read_to = 0

    def __call__(self, row: TrainingRow, error: ImageError) -> None:
        new = self._add(Reject(self.source, row.key, error.kind, str(error)))
        if self.stop:
            raise DataError(
                f"{self.source} ({row.key}) has become unusable: {error}. Mend it, or set data.on_bad_row to "
                f"skip; it is listed in {self.file}"
            )
        if new:
            print(f"a row is left out: {self.source} ({row.key}): {error}", flush=True)

    def _add(self, reject: Reject) -> bool:
        """Whether the row was not in the file yet."""
        identity = (reject.source, reject.key)
        if identity in self._seen:
            return False
        with self.file.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read_to)
            self._seen |= {(line["source"], line["key"]) for line in map(json.loads, file)}
            if new := identity not in self._seen:
                file.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")
                self._seen.add(identity)
            file.flush()
            self._read_to = file.tell()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone leaves it with a process forked meanwhile
        return new


def count_rejects(file: Path) -> dict[str, int]:
    """How many rows of each kind a rejects file lists; nothing if there is none."""
    if not file.exists():
        return {}
    with file.open(encoding="utf-8") as lines:
        return dict(Counter(json.loads(line)["kind"] for line in lines).most_common())


def rejected_rows(counts: Mapping[str, int]) -> dict[str, float]:
    """Counts of rejected rows by kind as metrics."""
    kinds = {f"rejected_rows/{kind}": float(count) for kind, count in counts.items()}
    return {**kinds, "rejected_rows": float(sum(counts.values()))}
