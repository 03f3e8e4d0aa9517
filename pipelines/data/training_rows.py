"""Read and check training rows, and apply the policy for unusable ones.

Formats, local or at any fsspec URL: ``.json`` and ``.jsonl``, also compressed, with LLaVA's ``image`` and
``conversations`` or with ``images`` and ``messages``; ``.parquet`` and ``.arrow`` with the same columns and
image bytes. Every row is checked
here, with a reason its owner can act on, so that no error appears hours later in a training step.
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

from pipelines.data.conversations import parse_row
from pipelines.data.images import MAX_PIXELS, FileImage, ImageError
from pipelines.data.parquet_cells import forget_columns
from pipelines.data.records import Record, read_records
from pipelines.data.rows import BadRow, ImageSource, Reject, TrainingRow
from pipelines.data.storage import absolute
from pipelines.shared.console import say
from skipvision.errors import DataError

CheckImages = Literal["decode", "exists", "none"]
"""decode = decode every image now; exists = check that image files exist; none = trust the data set."""
OnBadRow = Literal["skip", "stop"]
"""skip = continue without rejected rows; stop = raise an error that names them."""

_BATCH_ROWS = 256
_PROGRESS_SECONDS = 5.0
_NAMED_IN_ERROR = 3


class TrainingData(NamedTuple):
    """The usable rows of a data set and the rejected ones, both in the order of the file."""

    rows: list[TrainingRow]
    rejects: list[Reject]


def read_training_rows(
    source: str,
    *,
    image_root: str | None = None,
    check_images: CheckImages = "decode",
    max_pixels: int = MAX_PIXELS,
    threads: int = 8,
    without_answer: bool = False,
) -> TrainingData:
    """Read a file, or all files that match a pattern with ``*``, and check every row.

    A repeated id gets a suffix (``a``, ``a#2``), so keys are unique. Rows hold references to their images,
    not pixels; only images given in JSON as data URLs or base64 stay in memory, encoded.

    Args:
        source: path, URL or pattern.
        image_root: where relative image paths start; None = the folder of their file.
        check_images: how images are checked.
        max_pixels: images with more pixels are rejected.
        threads: images checked in parallel.
        without_answer: also return rows without an answer (see `TrainingRow.answered`).

    Raises:
        DataError: a file cannot be read.
    """
    forget_columns()
    data = TrainingData([], [])
    ids: dict[str, int] = {}
    records = read_records(source, max_pixels)
    shown = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        images = _ImageCheck(check_images, pool)
        while batch := list(islice(records, _BATCH_ROWS)):
            outcomes = [_parse(record, image_root, max_pixels, ids, without_answer) for record in batch]
            images.check(row.images for row in outcomes if isinstance(row, TrainingRow))
            for record, row in zip(batch, outcomes, strict=True):
                if isinstance(row, Reject):
                    data.rejects.append(row)
                elif problem := images.problem_of(row):
                    data.rejects.append(_reject(record, row.key, problem))
                else:
                    data.rows.append(row)
            if time.monotonic() - shown > _PROGRESS_SECONDS:
                shown = time.monotonic()
                say(f"{source}: {len(data.rows)} rows read, {len(data.rejects)} rejected")
    return data


def apply_bad_row_policy(
    rows: Sequence[TrainingRow], rejects: Sequence[Reject], on_bad_row: OnBadRow, rejects_path: str
) -> dict[str, int]:
    """Write the rejects to ``rejects_path`` as JSON lines and return their count by kind.

    Without rejects, the file of an earlier run is removed.

    Raises:
        DataError: no row is usable, or some are not and ``on_bad_row`` is "stop".
    """
    _write_rejects(rejects, absolute(rejects_path))
    counts = dict(Counter(reject.kind for reject in rejects).most_common())
    listed = ", ".join(f"{count} × {kind}" for kind, count in counts.items())
    if not rows:
        cause = f"all {len(rejects)} rows are rejected ({listed})" if rejects else "it is empty"
        raise DataError(f"the data set has no usable row: {cause}{_examples(rejects, rejects_path)}")
    if rejects and on_bad_row == "stop":
        raise DataError(
            f"{len(rejects)} of {len(rows) + len(rejects)} rows cannot be used ({listed}); "
            f"fix them, or set on_bad_row to skip{_examples(rejects, rejects_path)}"
        )
    return {str(kind): count for kind, count in counts.items()}


def read_rows(source: str) -> list[TrainingRow]:
    """Read and check rows of which each must be usable. Raise `DataError` if one is not."""
    data = read_training_rows(source)
    if data.rejects:
        first = data.rejects[0]
        raise DataError(
            f"{source}: {len(data.rejects)} rows cannot be used, for example {first.key}: {first.reason}"
        )
    return data.rows


# --------------------------------------------------------------------------------------------- rows


def _parse(
    record: Record, image_root: str | None, max_pixels: int, ids: dict[str, int], without_answer: bool
) -> TrainingRow | Reject:
    key = _unique(_id_of(record), ids)
    root = posixpath.dirname(record.file) if image_root is None else absolute(image_root)
    try:
        if record.problem:
            raise BadRow("broken record", record.problem)
        return parse_row(
            record.value,
            key=key,
            image_root=root,
            max_pixels=max_pixels,
            source=_source(record),
            without_answer=without_answer,
        )
    except BadRow as problem:
        return _reject(record, key, problem)


def _id_of(record: Record) -> str:
    given = record.value.get("id") if isinstance(record.value, dict) else None
    return str(given) if isinstance(given, str | int | float) and given != "" else record.fallback_key


def _unique(name: str, ids: dict[str, int]) -> str:
    """Return the name, with the next free ``#number`` if it is taken; ``ids`` has the last number of each."""
    if name not in ids:
        ids[name] = 1
        return name
    number = ids[name] + 1
    while (key := f"{name}#{number}") in ids:
        number += 1
    ids[name], ids[key] = number, 1
    return key


def _reject(record: Record, key: str, problem: BadRow) -> Reject:
    return Reject(_source(record), key, problem.kind, problem.reason)


def _source(record: Record) -> str:
    return f"{record.file}: {record.place}"


# ------------------------------------------------------------------------------------------- images


class _ImageCheck:
    """Checks every image once, several in parallel, and keeps the result."""

    def __init__(self, mode: CheckImages, pool: Executor) -> None:
        self.mode, self.pool = mode, pool
        self.checked: dict[ImageSource, BadRow | None] = {}

    def check(self, images_of_rows: Iterable[tuple[ImageSource, ...]]) -> None:
        if self.mode == "none":
            return
        every = (image for images in images_of_rows for image in images)
        new = dict.fromkeys(image for image in every if image not in self.checked)
        self.checked.update(zip(new, self.pool.map(self._problem, new), strict=True))

    def problem_of(self, row: TrainingRow) -> BadRow | None:
        return next((problem for image in row.images if (problem := self.checked.get(image))), None)

    def _problem(self, image: ImageSource) -> BadRow | None:
        try:
            if self.mode == "decode":
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
    with fs.open(name, "w", encoding="utf-8", errors="backslashreplace") as file:
        for reject in rejects:
            file.write(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n")


def _examples(rejects: Sequence[Reject], rejects_path: str) -> str:
    if not rejects:
        return ""
    lines = [f"\n  {r.source} ({r.key}): {r.reason}" for r in rejects[:_NAMED_IN_ERROR]]
    if len(rejects) > _NAMED_IN_ERROR:
        lines.append(f"\n  and {len(rejects) - _NAMED_IN_ERROR} more")
    return "".join(lines) + f"\nAll rejected rows are listed in {rejects_path}"
