"""Read any input as one stream of records: folders, images, JSON, parquet, Arrow, tars, tables.

Image bytes stay in their files until a row is used. Files are read in the order of their names, so the order
of the records is reproducible.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pipelines.data.folders import Entry, matching, walk
from pipelines.data.formats import IMAGE_SUFFIXES, Format, check_format, name_of_rows, unsupported
from pipelines.data.images import FileImage, ImageError, size_of
from pipelines.data.records import Record, json_records, jsonl_records, table_records
from pipelines.data.storage import absolute, failure_of, is_local, locate, open_image_file
from pipelines.data.tar_records import tar_records
from pipelines.data.tsv_records import tsv_records
from skipvision.errors import DataError
from skipvision.files import NotAFileError, check_regular

_FORMATS = ("json", "jsonl", "parquet", "arrow", "tar", "tsv")
_HEAD = 2**20
"""Bytes in which the header of an image is looked for."""


class Wanted(NamedTuple):
    """The columns to read of each row, possible names of the image column, and max pixels of an image."""

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
        fs, path = locate(url)
        entries = _entries(fs, path, url)
    except DataError:
        raise
    except NotAFileError as error:
        raise DataError(f"{url} cannot be read: {error.strerror}") from None
    except Exception as error:  # storage back ends raise errors of many types
        failure = failure_of(error)
        if isinstance(failure, FileNotFoundError):
            raise DataError(f"{url} does not exist") from None
        raise DataError(f"{url} cannot be opened: {failure or error}") from error
    whole: Callable[[str], str] = str if is_local(fs) else fs.unstrip_protocol
    if entries is None:
        passed_over: Counter[str] = Counter()
        return Inputs(_folder(walk(fs, path), whole, wanted, passed_over), passed_over)
    kinds = _kinds(entries)
    if kinds == [None] and entries[0].path == path:
        _check_image(whole(entries[0].path))
    return Inputs(_files(list(zip(entries, kinds, strict=True)), whole, wanted), Counter())


def _entries(fs: Any, path: str, url: str) -> list[Entry] | None:
    """Return the files that a source names; None if it is a folder."""
    one = [Entry(path, PurePosixPath(path).name)]
    if "*" in path and not (is_local(fs) and fs.exists(path)):
        found = matching(fs, path)
        if not found:
            raise DataError(f"no file matches {url}")
        return found
    if url.startswith(("http://", "https://")) and PurePosixPath(path).suffix:
        return one  # whether it is a folder could only be seen in its content
    if fs.isdir(path):
        return None
    if not url.startswith(("http://", "https://")):
        fs.info(path)
    if is_local(fs):
        check_regular(path)
    return one


def _kinds(entries: Sequence[Entry]) -> list[Format | None]:
    """Return the format of each file, None for images; raise `DataError` if no file has one that is read.

    Among files that are read, a file of another kind becomes an error row when it is opened as an image.
    """
    kinds: list[Format | None] = []
    refusals = []
    for entry in entries:
        try:
            kinds.append(check_format(entry.path, _FORMATS))
        except DataError as refusal:
            refusals.append(refusal)
            kinds.append(None)
    if len(refusals) == len(entries):
        raise refusals[0]
    return kinds


def _check_image(file: str) -> None:
    """Raise `DataError` if a single file of unknown format is neither rows nor an image."""
    if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES:
        return
    try:
        with open_image_file(file) as stream:
            size_of(io.BytesIO(stream.read(_HEAD)), file)
    except ImageError:
        raise DataError(f"{unsupported(file, _FORMATS)}, or an image") from None


def _folder(
    entries: Iterator[Entry], whole: Callable[[str], str], wanted: Wanted, passed_over: Counter[str]
) -> Iterator[Record]:
    """Yield the images below a folder, without hidden files and folders."""
    for entry in entries:
        suffix = PurePosixPath(entry.below).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            yield _image_record(whole(entry.path), entry.below, wanted.max_pixels)
        else:
            passed_over[suffix] += 1


def _files(
    files: Sequence[tuple[Entry, Format | None]], whole: Callable[[str], str], wanted: Wanted
) -> Iterator[Record]:
    for entry, kind in files:
        file = whole(entry.path)
        if kind is None:
            yield _image_record(file, entry.below, wanted.max_pixels)
        elif kind.name == "tar":
            yield from tar_records(file, wanted.columns, wanted.images, wanted.max_pixels, kind.compression)
        elif kind.name == "tsv":
            yield from tsv_records(file, name_of_rows(entry.below), wanted.images, wanted.max_pixels)
        else:
            yield from _renamed(_rows(file, kind, wanted), name_of_rows(entry.below))


def _rows(file: str, kind: Format, wanted: Wanted) -> Iterator[Record]:
    if kind.name == "json":
        return json_records(file, kind.compression)
    if kind.name == "jsonl":
        return jsonl_records(file, kind.compression)
    columns = wanted.columns | set(wanted.images)
    return table_records(file, kind.name, columns, wanted.images, wanted.max_pixels)


def _image_record(file: str, below: str, max_pixels: int) -> Record:
    row = {"image": FileImage(file, max_pixels), "path": below, "stem": PurePosixPath(below).stem}
    return Record(file, "", below, row)


def _renamed(records: Iterator[Record], name: str) -> Iterator[Record]:
    """Yield the records with keys made of their file's relative path, which is unique."""
    for record in records:
        number = record.fallback_key.rpartition("-")[2]
        yield Record(record.file, record.place, f"{name}-{number}", record.value, record.problem)
