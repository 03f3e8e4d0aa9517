"""Find keys that occur more than once among any number of keys, in constant memory.

The job would need gigabytes for the keys of 10⁸ rows. `KeyHashes` keeps a 64-bit hash of each, in sorted runs
on the disk. `RepeatedKeys` compares keys whose hashes are equal, and names their rows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.caption.rows import CaptionRow, Problem

_RUN = 2**20
"""Hashes in memory at a time (8 MiB)."""

Hashes = np.ndarray[Any, np.dtype[np.int64]]


class KeyHashes:
    """The hashes of all keys, in files of a folder once they are many.

    Args:
        folder: an existing folder, in which two files are created: ``runs`` and ``sorted``.
    """

    def __init__(self, folder: Path) -> None:
        self._runs, self._all = folder / "runs", folder / "sorted"
        self._new = array("q")
        self._spilled = 0
        self._sorted: Hashes | None = None

    def __len__(self) -> int:
        return self._spilled + len(self._new)

    def add(self, key: str) -> None:
        """Add a key. The next hash after a full run starts another run."""
        self._new.append(hash(key))
        if len(self._new) == _RUN:
            self._spill()

    def __contains__(self, key: str) -> bool:
        """Return whether a key has probably been added; certainly not if this is false."""
        if self._sorted is None:
            self._sorted = self._in_order()
        return within(hash(key), self._sorted)

    def repeated(self) -> Hashes:
        """Return the hashes that occur more than once, in ascending order."""
        return np.concatenate([np.zeros(0, np.int64), *map(_repeated, self._buckets())])

    def remove(self) -> None:
        """Remove the files that hold hashes."""
        self._sorted = None
        for file in (self._runs, self._all):
            file.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------- on disk

    def _spill(self) -> None:
        with self._runs.open("ab") as file:
            file.write(np.sort(np.frombuffer(self._new, np.int64)).tobytes())
        self._spilled += len(self._new)
        self._new = array("q")

    def _buckets(self) -> Iterator[Hashes]:
        """Yield all hashes in ascending order, about `_RUN` at a time.

        Hashes are evenly distributed over all integers, whatever the keys. So each bucket has about the same
        number of hashes from each run.
        """
        if not self._spilled:
            yield np.sort(np.frombuffer(self._new, np.int64))
            return
        if self._new:
            self._spill()
        starts = range(0, self._spilled, _RUN)
        bounds = np.array([-(2**63) + 2**64 * i // len(starts) for i in range(1, len(starts))], np.int64)
        cuts = [
            np.concatenate([[0], np.searchsorted(run, bounds), [len(run)]]).astype(np.int32)
            for run in (self._read(start, _RUN) for start in starts)
        ]
        for bucket in range(len(starts)):
            pieces = [
                self._read(start + int(cut[bucket]), int(cut[bucket + 1] - cut[bucket]))
                for start, cut in zip(starts, cuts, strict=True)
            ]
            yield np.sort(np.concatenate(pieces))

    def _read(self, start: int, count: int) -> Hashes:
        return np.fromfile(self._runs, np.int64, count, offset=8 * start)

    def _in_order(self) -> Hashes:
        if not self._spilled:
            return next(self._buckets())
        with self._all.open("wb") as file:
            for bucket in self._buckets():
                file.write(bucket.tobytes())
        return np.memmap(self._all, np.int64, "r")


def _repeated(ordered: Hashes) -> Hashes:
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def within(value: int, ordered: Hashes) -> bool:
    """Return whether an ascending array contains a value."""
    at = int(np.searchsorted(ordered, value))
    return at < ordered.size and int(ordered[at]) == value


class RepeatedKeys:
    """Gives rows with the key of an earlier row a new key. It needs memory for each key that repeats."""

    def __init__(self, hashes: KeyHashes) -> None:
        self.all = hashes
        self.hashes = hashes.repeated()
        self.without_problem = 0
        self._first: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()

    def renamed(self, rows: Iterable[CaptionRow]) -> Iterator[CaptionRow]:
        """Yield the rows. A row whose key was used before gets a new key and a problem."""
        for row in rows:
            if not within(hash(row.key), self.hashes):
                yield row
            elif row.key not in self._first:
                self._first[row.key] = row.source
                yield row
            else:
                if row.problem is None:
                    self.without_problem += 1
                    reason = f"the key {row.key!r} is that of an earlier row ({self._first[row.key]})"
                    row = replace(row, problem=Problem("duplicate key", reason), messages=(), images=())
                yield replace(row, key=self._free(row.key))

    def _free(self, key: str) -> str:
        """Return the next of ``key#2``, ``key#3`` … that no row has as its own key."""
        while True:
            self._numbers[key] += 1
            name = f"{key}#{self._numbers[key] + 1}"
            if name not in self.all:
                return name
