"""Read any input as one stream of records: folders, images, JSON, JSON lines, parquet, tars, tables.

Image bytes stay in their files until a row is used. Files are read in the order of their names, so the order
of the records is reproducible.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.images import FileImage, ParquetImage
from pipelines.data.records import Record, absolute, json_records, jsonl_records, without_bytes
from pipelines.data.tar_records import IMAGE_SUFFIXES, tar_records
from pipelines.data.tsv_records import tsv_records
from skipvision.errors import DataError

_BATCH_ROWS = 64  # small, because image bytes of lists pass through memory


class Wanted(NamedTuple):
    """What to read of each row: columns, possible names of the image column, and max pixels of an image."""

    columns: frozenset[str]
    images: Sequence[str]
    max_pixels: int


class Inputs(NamedTuple):
    """Records in order and, after they are read, the number of ignored files in a folder by suffix."""

    records: Iterator[Record]
    passed_over: Counter[str]


def read_inputs(source: str, wanted: Wanted) -> Inputs:
    """Return all records of a source: a file, a folder, or a pattern with ``*``.

    A record's value is a mapping of columns. For an image file the columns are ``image``, ``path`` (relative
    to the folder) and ``stem``.

    Raises:
        DataError: a file cannot be read; raised at once or while the records are read.
    """
    url = absolute(source)
    try:
        fs, path = fsspec.core.url_to_fs(url)
        folder = "*" not in path and fs.isdir(path)
        if "*" not in path and not folder and not fs.exists(path):
            raise DataError(f"{url} does not exist")
    except (ImportError, ValueError, OSError) as error:
        raise DataError(f"{url} cannot be opened: {error}") from error
    whole: Callable[[str], str] = fs.unstrip_protocol if "://" in url else str
    if folder:
        passed_over: Counter[str] = Counter()
        return Inputs(_folder(fs, path, whole, wanted, passed_over), passed_over)
    root = posixpath.dirname(path.split("*")[0] if "*" in path else path)
    names = sorted(fs.glob(path)) if "*" in path else [path]
    if not names:
        raise DataError(f"no file matches {url}")
    return Inputs(_files(fs, names, root, whole, wanted), Counter())


def _folder(
    fs: Any, root: str, whole: Callable[[str], str], wanted: Wanted, passed_over: Counter[str]
) -> Iterator[Record]:
    """Yield the images below a folder, without hidden files and folders."""
    for folder, folders, files in fs.walk(root, detail=True, on_error="raise"):
        # `walk` descends into the folders that remain in its mapping.
        kept = {name: folders[name] for name in sorted(folders) if not name.startswith(".")}
        folders.clear()
        folders.update(kept)
        for name in sorted(files):
            suffix = PurePosixPath(name).suffix.lower()
            if not name or name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                path = posixpath.join(folder, name)
                yield _image_record(whole(path), posixpath.relpath(path, root), wanted.max_pixels)
            else:
                passed_over[suffix] += 1


def _files(
    fs: Any, names: Sequence[str], root: str, whole: Callable[[str], str], wanted: Wanted
) -> Iterator[Record]:
    for name in names:
        file, below = whole(name), posixpath.relpath(name, root or ".")
        reader = _READERS.get(PurePosixPath(name).suffix.lower())
        if reader is not None:
            try:
                yield from reader(file, str(PurePosixPath(below).with_suffix("")), wanted)
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error}") from error
        elif len(names) == 1 or not fs.isdir(name):
            yield _image_record(file, below, wanted.max_pixels)


def _image_record(file: str, below: str, max_pixels: int) -> Record:
    row = {"image": FileImage(file, max_pixels), "path": below, "stem": PurePosixPath(below).stem}
    return Record(file, "", below, row)


def _renamed(records: Iterator[Record], name: str) -> Iterator[Record]:
    """Yield the records with keys made of their file's relative path, which is unique."""
    for record in records:
        number = record.fallback_key.rpartition("-")[2]
        yield Record(record.file, record.place, f"{name}-{number}", record.value, record.problem)


def _json(file: str, name: str, wanted: Wanted) -> Iterator[Record]:
    return _renamed(json_records(file, wanted.max_pixels), name)


def _jsonl(file: str, name: str, wanted: Wanted) -> Iterator[Record]:
    return _renamed(jsonl_records(file, wanted.max_pixels), name)


def _tar(file: str, name: str, wanted: Wanted) -> Iterator[Record]:
    return tar_records(file, wanted.columns, wanted.images, wanted.max_pixels)


def _tsv(file: str, name: str, wanted: Wanted) -> Iterator[Record]:
    return tsv_records(file, name, wanted.images, wanted.max_pixels)


# ------------------------------------------------------------------------------------------ parquet


def _parquet(file: str, name: str, wanted: Wanted) -> Iterator[Record]:
    with fsspec.open(file, "rb") as stream:
        try:
            table = pq.ParquetFile(stream)
            schema = table.schema_arrow
            images = [column for column in wanted.images if column in schema.names]
            # Cells of one image each are referred to without being read.
            referred = [column for column in images if _holds_bytes(schema.field(column).type)]
            read = [
                column
                for column in schema.names
                if column not in referred and (column in wanted.columns or column in images)
            ]
            number = 0
            for group in range(table.num_row_groups):
                for row, value in enumerate(_group_rows(table, group, read)):
                    number += 1
                    for column in images:
                        refer = partial(ParquetImage, file, group, row, column, max_pixels=wanted.max_pixels)
                        value[column] = (
                            refer(0) if column in referred else without_bytes(value[column], refer)
                        )
                    yield Record(file, f"row {number}", f"{name}-{number}", value)
        except pa.ArrowException as error:
            raise DataError(f"{file} is not a readable parquet file: {error}") from error


def _group_rows(table: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(table.metadata.row_group(group).num_rows))
        return
    for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
        yield from batch.to_pylist()


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return True
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


_READERS: dict[str, Callable[[str, str, Wanted], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".tar": _tar,
    ".tsv": _tsv,
}
