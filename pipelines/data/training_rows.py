"""Training rows from the files users have, and what to do about the rows that cannot be used.

Read by suffix: ``.json`` and ``.jsonl`` with LLaVA's ``image`` and ``conversations`` or with chat's
``images`` and ``messages``, and ``.parquet`` with the same columns and image bytes in it; local or at
any fsspec URL. What is wrong with a row is found here, with a reason its owner can act on, and not
hours later by the training step that meets it.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import Literal, NamedTuple

import fsspec

from pipelines.data.conversations import BadRow, parse_row
from pipelines.data.images import MAX_PIXELS, FileImage, ImageError
from pipelines.data.parquet_cells import forget_columns
from pipelines.data.records import Record, absolute, read_records
from pipelines.data.rows import ImageSource, Reject, TrainingRow
from skipvision.errors import DataError

CheckImages = Literal["decode", "exists", "none"]
"""Decode every image now; or only see that image files are there; or trust the data set."""
OnBadRow = Literal["skip", "stop"]
"""Go on without the rows that were rejected, or end with an error that names them."""

_BATCH_ROWS = 256
_PROGRESS_SECONDS = 5.0
_NAMED_IN_ERROR = 3


class TrainingData(NamedTuple):
    """The rows of a data set that can be used, and the others, both in the order of the file."""

    rows: list[TrainingRow]
    rejects: list[Reject]


def read_training_rows(
    source: str,
    *,
    image_root: str | None = None,
    check_images: CheckImages = "decode",
    max_pixels: int = MAX_PIXELS,
    threads: int = 8,
) -> TrainingData:
    """Read a file, or all files that match a pattern with ``*``, and check every row.

    Relative image paths start at ``image_root``, by default the folder of the file they stand in. An
    id that repeats, as ids in mixed data sets do, gets a suffix (``a``, ``a#2``), so keys are unique.
    Rows hold references to their images and no pixels; only images written into JSON as data URLs or
    base64 stay in memory, encoded. Raises `DataError` if a file cannot be read at all.
    """
    forget_columns()
    data = TrainingData([], [])
    ids: dict[str, int] = {}
    records = read_records(source, max_pixels)
    shown = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        check = _ImageCheck(check_images, pool)
        while batch := list(islice(records, _BATCH_ROWS)):
            outcomes = [_parse(record, image_root, max_pixels, ids) for record in batch]
            check.look_at(row.images for row in outcomes if isinstance(row, TrainingRow))
            for record, row in zip(batch, outcomes, strict=True):
                if isinstance(row, Reject):
                    data.rejects.append(row)
                elif problem := check.problem_of(row):
                    data.rejects.append(_reject(record, row.key, problem))
                else:
                    data.rows.append(row)
            if time.monotonic() - shown > _PROGRESS_SECONDS:
                shown = time.monotonic()
                print(f"{source}: {len(data.rows)} rows read, {len(data.rejects)} rejected", flush=True)
    return data


def apply_bad_row_policy(
    rows: Sequence[TrainingRow], rejects: Sequence[Reject], on_bad_row: OnBadRow, rejects_path: str
) -> dict[str, int]:
    """Write the rejects to ``rejects_path`` as JSON lines, and say how many there are of each kind.

    Raises `DataError` if there are rejects and ``on_bad_row`` is ``"stop"``, and always if no row is
    left. Without rejects there is no file, nor one that an earlier run left.
    """
    _write_rejects(rejects, absolute(rejects_path))
    counts = dict(Counter(reject.kind for reject in rejects).most_common())
    listed = ", ".join(f"{count} × {kind}" for kind, count in counts.items())
    if not rows:
        cause = f"all {len(rejects)} rows were rejected ({listed})" if rejects else "it has no rows"
        raise DataError(f"the data set has nothing to train on: {cause}{_examples(rejects, rejects_path)}")
    if rejects and on_bad_row == "stop":
        raise DataError(
            f"{len(rejects)} of {len(rows) + len(rejects)} rows cannot be used ({listed}); "
            f"mend them, or set on_bad_row to skip{_examples(rejects, rejects_path)}"
        )
    return {str(kind): count for kind, count in counts.items()}


def read_rows(source: str) -> list[TrainingRow]:
    """Read test rows. Raise `DataError` if any of them is unusable."""
    data = read_training_rows(source)
    if data.rejects:
        first = data.rejects[0]
        raise DataError(
            f"{source}: {len(data.rejects)} rows cannot be used, for example {first.key}: {first.reason}"
        )
    return data.rows


# --------------------------------------------------------------------------------------------- rows


def _parse(
    record: Record, image_root: str | None, max_pixels: int, ids: dict[str, int]
) -> TrainingRow | Reject:
    key = _unique(_id_of(record), ids)
    root = posixpath.dirname(record.file) if image_root is None else absolute(image_root)
    try:
        if record.problem:
            raise BadRow("broken record", record.problem)
        return parse_row(record.value, key=key, image_root=root, max_pixels=max_pixels)
    except BadRow as problem:
        return _reject(record, key, problem)


def _id_of(record: Record) -> str:
    given = record.value.get("id") if isinstance(record.value, dict) else None
    return str(given) if isinstance(given, str | int | float) and given != "" else record.fallback_key


def _unique(name: str, ids: dict[str, int]) -> str:
    """The name, with the next free ``#number`` if it was used; ``ids`` holds the last number of each."""
    if name not in ids:
        ids[name] = 1
        return name
    number = ids[name] + 1
    while (key := f"{name}#{number}") in ids:
        number += 1
    ids[name], ids[key] = number, 1
    return key


def _reject(record: Record, key: str, problem: BadRow) -> Reject:
    return Reject(f"{record.file}: {record.place}", key, problem.kind, problem.reason)


# ------------------------------------------------------------------------------------------- images


class _ImageCheck:
    """Looks at every image once, several at a time, and remembers what was wrong with it."""

    def __init__(self, how: CheckImages, pool: Executor) -> None:
        self.how, self.pool = how, pool
        self.seen: dict[ImageSource, BadRow | None] = {}

    def look_at(self, images_of_rows: Iterable[tuple[ImageSource, ...]]) -> None:
        if self.how == "none":
            return
        new = dict.fromkeys(image for images in images_of_rows for image in images if image not in self.seen)
        self.seen.update(zip(new, self.pool.map(self._problem, new), strict=True))

    def problem_of(self, row: TrainingRow) -> BadRow | None:
        return next((problem for image in row.images if (problem := self.seen.get(image))), None)

    def _problem(self, image: ImageSource) -> BadRow | None:
        try:
            if self.how == "decode":
                image.open()
            elif isinstance(image, FileImage):
                image.check_exists()
        except ImageError as error:
            return BadRow(error.kind, str(error))
        return None


# ------------------------------------------------------------------------------------------ rejects


def _write_rejects(rejects: Sequence[Reject], path: str) -> None:
    fs, name = fsspec.core.url_to_fs(path)
    if not rejects:
        if fs.exists(name):
            fs.rm(name)
        return
    fs.makedirs(posixpath.dirname(name), exist_ok=True)
    with fs.open(name, "w", encoding="utf-8") as file:
        for reject in rejects:
            file.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")


def _examples(rejects: Sequence[Reject], rejects_path: str) -> str:
    if not rejects:
        return ""
    lines = [f"\n  {r.source} ({r.key}): {r.reason}" for r in rejects[:_NAMED_IN_ERROR]]
    if len(rejects) > _NAMED_IN_ERROR:
        lines.append(f"\n  and {len(rejects) - _NAMED_IN_ERROR} more")
    return "".join(lines) + f"\nAll of them are listed in {rejects_path}"
