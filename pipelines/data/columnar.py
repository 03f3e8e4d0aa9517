"""Read rows of parquet and Arrow files; image bytes stay in the file.

Training and captioning read the same cells: bytes, a path, a struct of these, or a list of any of them. A
struct's bytes win over its path. A struct without any of them is no image.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.arrow_files import ArrowTable
from pipelines.data.formats import rows_of
from pipelines.data.images import ParquetImage
from pipelines.data.media import UNREAD
from pipelines.data.parquet_cells import open_parquet
from pipelines.data.presence import present, present_in_row_group
from skipvision.errors import DataError

_BATCH_ROWS = 64  # small, because image bytes of lists pass through memory
_NAMES = ("bytes", "path", "url")


class Group(Protocol):
    """Consecutive rows of a table."""

    rows: int

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the rows, with some columns only."""

    def has_no_null(self, column: str, field: str | None) -> bool:
        """Return whether it is known that a column, or this field of a struct, has a value in every row."""

    def present(self, column: str) -> Iterator[bool]:
        """Yield for each row whether its cell in the column is not empty."""


def table_rows(
    file: str,
    kind: str,
    wanted: Callable[[Sequence[str]], Collection[str]],
    images: Sequence[str],
    max_pixels: int,
    unread: Callable[..., bool] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with image bytes replaced by references to the file.

    Args:
        file: absolute path or URL.
        kind: ``"parquet"`` or ``"arrow"``.
        wanted: returns the columns to read out of all columns of the file.
        images: columns of images; those that the file lacks are left out.
        max_pixels: max pixels of an image, checked when it is opened.
        unread: returns whether the content of a column is not needed, as `needs_no_content` does; a row has
            `UNREAD` or None instead.

    Raises:
        DataError: the file cannot be read.
    """
    with rows_of(file) as stream:
        try:
            table = _Parquet(stream) if kind == "parquet" else _Arrow(file)
            names = table.schema.names
            columns = [name for name in names if name in wanted(names)]
            found = [name for name in images if name in columns]
            marked = [
                name
                for name in columns
                if unread is not None
                and name not in found
                and unread(name, **_kind(table.schema.field(name)))
            ]
            columns = [name for name in columns if name not in marked]
            for number, group in enumerate(table.groups()):
                rows = _group_rows(file, table.schema, number, group, columns, found, max_pixels)
                yield from _marked(rows, group, marked)
        except pa.ArrowException as error:
            raise DataError(f"{file} is not a readable {kind} file: {error}") from error


def _group_rows(
    file: str,
    schema: pa.Schema,
    number: int,
    group: Group,
    columns: Sequence[str],
    images: Sequence[str],
    max_pixels: int,
) -> Iterator[dict[str, Any]]:
    # Cells with one image each, all of them as bytes, are referred to without being read.
    referred = [column for column in images if _all_bytes(schema, group, column)]
    read = [column for column in columns if column not in referred]
    for row, value in enumerate(group.read(read) if read else ({} for _ in range(group.rows))):
        for column in images:
            refer = partial(ParquetImage, file, number, row, column, max_pixels=max_pixels)
            value[column] = refer(0) if column in referred else without_bytes(value[column], refer)
        yield value


def _marked(rows: Iterator[dict[str, Any]], group: Group, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows with `UNREAD` in those of these columns that are not empty, None in the others."""
    marks = [group.present(column) for column in columns]
    for row in rows:
        found = (next(mark) for mark in marks)
        yield row | dict(zip(columns, (UNREAD if one else None for one in found), strict=True))


def _kind(field: pa.Field) -> dict[str, bool]:
    """Return what `pipelines.data.media.needs_no_content` takes about a column."""
    kind, inner = field.type, [field.type]
    while any(hasattr(one, "num_fields") and one.num_fields for one in inner):
        inner = [
            part for one in inner for part in ([one.field(n).type for n in range(one.num_fields)] or [one])
        ]
    number = pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return {"is_number": bool(number), "has_bytes": any(map(_is_bytes, inner))}


def _all_bytes(schema: pa.Schema, group: Group, column: str) -> bool:
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _is_bytes(kind.field(at).type) and group.has_no_null(column, "bytes")
    return _is_bytes(kind) and group.has_no_null(column, None)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def without_bytes(cell: Any, refer: Callable[[int], ParquetImage]) -> object:
    """Return the cell with its bytes replaced by references to the file.

    ``refer`` makes a reference from the number of the image in the cell.
    """

    def reduce(value: Any, index: int) -> object:
        if isinstance(value, dict) and not any(value.get(name) for name in _NAMES):
            return None  # some writers encode "no image" in this way
        data = value.get("bytes") if isinstance(value, dict) else value
        return refer(index) if isinstance(data, bytes) else value

    if isinstance(cell, list):
        return [reduce(value, index) for index, value in enumerate(cell)]
    return reduce(cell, 0)


# ------------------------------------------------------------------------------------------ two formats


class _Parquet:
    def __init__(self, stream: Any) -> None:
        self.file = open_parquet(stream)
        self.schema = self.file.schema_arrow

    def groups(self) -> Iterator[Group]:
        return (_RowGroup(self.file, number) for number in range(self.file.num_row_groups))


class _RowGroup:
    def __init__(self, file: pq.ParquetFile, number: int) -> None:
        self.file, self.number = file, number
        self.metadata = file.metadata.row_group(number)
        self.rows: int = self.metadata.num_rows

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for batch in self.file.iter_batches(_BATCH_ROWS, row_groups=[self.number], columns=list(columns)):
            yield from batch.to_pylist()

    def has_no_null(self, column: str, field: str | None) -> bool:
        path = column if field is None else f"{column}.{field}"
        chunks = (self.metadata.column(number) for number in range(self.metadata.num_columns))
        found = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == path), None)
        return bool(found is not None and found.has_null_count and found.null_count == 0)

    def present(self, column: str) -> Iterator[bool]:
        return present_in_row_group(self.file, self.number, column)


class _Arrow:
    def __init__(self, path: str) -> None:
        self.file = ArrowTable(path)
        self.schema = self.file.schema

    def groups(self) -> Iterator[Group]:
        return map(_Batch, self.file.batches())


class _Batch:
    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.rows: int = batch.num_rows

    def read(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        chosen = self.batch.select(list(columns))
        for start in range(0, self.rows, _BATCH_ROWS):
            yield from chosen.slice(start, _BATCH_ROWS).to_pylist()

    def has_no_null(self, column: str, field: str | None) -> bool:
        values = self.batch.column(column)
        return values.null_count == 0 and (field is None or values.field(field).null_count == 0)

    def present(self, column: str) -> Iterator[bool]:
        return iter(present(self.batch.column(column)).to_pylist())
