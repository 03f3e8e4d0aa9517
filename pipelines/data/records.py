"""Read JSON, JSON lines and parquet files as one stream of records.

A record is checked for readability only; `pipelines.data.training_rows` checks its content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.images import ParquetImage
from pipelines.data.json_items import json_items
from skipvision.errors import DataError

PARQUET_COLUMNS = ("id", "task", "image", "images", "conversations", "messages")
"""The columns that are read; ``conversations`` or ``messages`` must exist."""
_IMAGE_COLUMNS = ("image", "images")
_BATCH_ROWS = 64  # small, because image bytes pass through memory


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file.

    Attributes:
        file: absolute path or URL.
        place: its position in the file, ``"line 17"``.
        fallback_key: the row's key if it has no id.
        value: the content; image bytes of parquet files are replaced by a `ParquetImage`.
        problem: why it could not be read; "" if it could.
    """

    file: str
    place: str
    fallback_key: str
    value: object
    problem: str = ""


def read_records(source: str, max_pixels: int) -> Iterator[Record]:
    """Yield the records of a file, or of all files that match a pattern with ``*``, sorted by name."""
    for file in _files(source):
        suffix = PurePosixPath(file).suffix.lower()
        if suffix not in _READERS:
            known = ", ".join(_READERS)
            raise DataError(f"{file} has the unsupported suffix {suffix!r}; use {known}")
        try:
            yield from _READERS[suffix](file, max_pixels)
        except FileNotFoundError:
            raise DataError(f"{file} does not exist") from None
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error


def absolute(path: str) -> str:
    """Return a path that is valid in every process: URLs unchanged, local paths absolute."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _files(source: str) -> list[str]:
    url = absolute(source)
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # an unknown protocol, or one whose package is missing
        raise DataError(f"{url} cannot be opened: {error}") from error
    if "*" not in path:
        return [url]
    found = sorted(fs.glob(path))
    if not found:
        raise DataError(f"no file matches {url}")
    return [fs.unstrip_protocol(name) if "://" in url else name for name in found]


def json_records(file: str, max_pixels: int) -> Iterator[Record]:
    """Yield the elements of a JSON list, or JSON lines, which are often named ``.json``, too."""
    with fsspec.open(file, "rb") as stream:
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


def jsonl_records(file: str, max_pixels: int) -> Iterator[Record]:
    """Yield one record for each line that is not empty."""
    with fsspec.open(file, "rb") as stream:
        yield from _lines(file, stream)


def _lines(file: str, stream: Iterator[bytes]) -> Iterator[Record]:
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


def _parquet_records(file: str, max_pixels: int) -> Iterator[Record]:
    with fsspec.open(file, "rb") as stream:
        try:
            yield from _table_records(file, pq.ParquetFile(stream), max_pixels)
        except pa.ArrowException as error:
            raise DataError(f"{file} is not a readable parquet file: {error}") from error


def _table_records(file: str, table: pq.ParquetFile, max_pixels: int) -> Iterator[Record]:
    present = table.schema_arrow.names
    columns = [name for name in PARQUET_COLUMNS if name in present]
    if not {"conversations", "messages"} & set(columns):
        raise DataError(f"{file} has no column `conversations` or `messages`; it has {', '.join(present)}")
    number = 0
    for group in range(table.num_row_groups):
        row = 0
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            for value in batch.to_pylist():
                for column in _IMAGE_COLUMNS:
                    refer = partial(ParquetImage, file, group, row, column, max_pixels=max_pixels)
                    value[column] = without_bytes(value.get(column), refer)
                number, row = number + 1, row + 1
                yield Record(file, f"row {number}", _fallback_key(file, number), value)


def without_bytes(cell: Any, refer: Callable[[int], ParquetImage]) -> object:
    """Return the cell with its bytes replaced by references to the file.

    ``refer`` makes a reference from the number of the image in the cell.
    """

    def reduce(value: Any, index: int) -> object:
        if isinstance(value, dict) and not any(value.values()):
            return None  # some writers encode "no image" in this way
        data = value.get("bytes") if isinstance(value, dict) else value
        return refer(index) if isinstance(data, bytes) else value

    if isinstance(cell, list):
        return [reduce(value, index) for index, value in enumerate(cell)]
    return reduce(cell, 0)


def _fallback_key(file: str, number: int) -> str:
    return f"{PurePosixPath(file).stem}-{number}"


_READERS = {".json": json_records, ".jsonl": jsonl_records, ".parquet": _parquet_records}
