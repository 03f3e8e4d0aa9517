"""Read JSON, JSON lines, parquet and Arrow files as one stream of records.

A record is checked for readability only; `pipelines.data.training_rows` checks its content.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO

from pipelines.data.columnar import table_rows
from pipelines.data.folders import matching
from pipelines.data.formats import Format, check_format, name_of_rows, rows_of, unsupported
from pipelines.data.json_items import json_items
from pipelines.data.media import MEDIA_FIELDS, OTHER_IMAGE_FIELDS, needs_no_content
from pipelines.data.storage import absolute, failure_of, is_local, locate
from pipelines.data.turns import CONVERSATION_COLUMNS, NO_CONVERSATION, has_conversation
from skipvision.errors import DataError

TRAINING_COLUMNS = ("id", "task", "image", "images", *CONVERSATION_COLUMNS)
"""The columns that are read; some of them must hold conversations."""
_IMAGE_COLUMNS = ("image", "images")
_FORMATS = ("json", "jsonl", "parquet", "arrow")


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file.

    Attributes:
        file: absolute path or URL.
        place: its position in the file, ``"line 17"``.
        fallback_key: the row's key if it has no id.
        value: the content; image bytes of parquet and Arrow files are replaced by a `ParquetImage`.
        problem: why it could not be read; "" if it could.
    """

    file: str
    place: str
    fallback_key: str
    value: object
    problem: str = ""


def read_records(source: str, max_pixels: int) -> Iterator[Record]:
    """Yield the records of a file, or of all files that match a pattern with ``*``, sorted by name.

    Raises:
        DataError: a file cannot be read, or has a format that is not read; raised before any record if the
            name shows it.
    """
    files = [(file, _format(file)) for file in files_of(source)]
    for file, kind in files:
        if kind.name == "json":
            yield from json_records(file, kind.compression)
        elif kind.name == "jsonl":
            yield from jsonl_records(file, kind.compression)
        else:
            yield from _training_table(file, kind.name, max_pixels)


def _format(file: str) -> Format:
    found = check_format(file, _FORMATS)
    if found is None:
        raise DataError(unsupported(file, _FORMATS))
    return found


def files_of(source: str) -> list[str]:
    """Return the path or URL of a file, or of all files that match a pattern with ``*``, sorted by name.

    Raises:
        DataError: there is no such file, it is a folder, or the storage fails.
    """
    url = absolute(source)
    try:
        fs, path = locate(url)
        if is_local(fs) and fs.isdir(path):
            raise DataError(f"{url} is a folder; give a file in it, or a pattern such as {url}/*.jsonl")
        if "*" not in path or (is_local(fs) and fs.exists(path)):
            return [url]
        found = [entry.path for entry in matching(fs, path)]
    except DataError:
        raise
    except Exception as error:  # an unknown protocol, or one whose package is missing, or any of a storage's
        raise DataError(f"{url} cannot be opened: {failure_of(error) or error}") from error
    if not found:
        raise DataError(f"no file matches {url}")
    return found if is_local(fs) else [fs.unstrip_protocol(name) for name in found]


def json_records(file: str, compression: str = "") -> Iterator[Record]:
    """Yield the elements of a JSON list, or JSON lines, which are often named ``.json``, too."""
    with rows_of(file, compression) as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        stream.seek(0)
        if not start.startswith(b"["):
            yield from _lines(file, stream)
            return
        try:
            for number, value in enumerate(json_items(stream), start=1):
                yield Record(file, f"row {number}", _fallback_key(file, number), value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not valid JSON: {error}") from error


def jsonl_records(file: str, compression: str = "") -> Iterator[Record]:
    """Yield one record for each line that is not empty."""
    with rows_of(file, compression) as stream:
        yield from _lines(file, stream)


def table_records(
    file: str, kind: str, columns: Collection[str], images: Sequence[str], max_pixels: int
) -> Iterator[Record]:
    """Yield the rows of a parquet or Arrow file, with those of ``columns`` that it has."""
    rows = table_rows(file, kind, lambda names: columns, images, max_pixels)
    for number, value in enumerate(rows, start=1):
        yield Record(file, f"row {number}", _fallback_key(file, number), value)


def _training_table(file: str, kind: str, max_pixels: int) -> Iterator[Record]:
    def wanted(names: Sequence[str]) -> Collection[str]:
        if not has_conversation(names):
            raise DataError(f"{file} has {NO_CONVERSATION}; its columns are {', '.join(names)}")
        # Rows with other media, or with images in other columns, are refused.
        return [
            *TRAINING_COLUMNS,
            *(name for name in names if name.lower() in MEDIA_FIELDS | OTHER_IMAGE_FIELDS),
        ]

    rows = table_rows(file, kind, wanted, _IMAGE_COLUMNS, max_pixels, unread=needs_no_content)
    for number, value in enumerate(rows, start=1):
        yield Record(file, f"row {number}", _fallback_key(file, number), value)


def _lines(file: str, stream: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        record = partial(Record, file, f"line {number}", _fallback_key(file, number))
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield record(None, f"is not valid JSON: {error}")
        else:
            yield record(value)


def _fallback_key(file: str, number: int) -> str:
    return f"{name_of_rows(posixpath.basename(file))}-{number}"
