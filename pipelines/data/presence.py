"""Find out which cells of a column are not empty, without their contents in memory.

A cell is empty by the rule of `pipelines.data.media.is_empty`: null, empty, or made of nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_BATCH_BYTES = 2**24
_MAX_BATCH_ROWS = 4096


def present(cells: Any) -> Any:
    """Return which cells of an Arrow array are not empty, as an array of booleans."""
    kind = cells.type
    if isinstance(cells, pa.ExtensionArray):
        return present(cells.storage)
    if pa.types.is_dictionary(kind):
        return present(cells.dictionary_decode())
    if pa.types.is_struct(kind) and kind.num_fields:
        return reduce(pc.or_, map(present, cells.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        full = pc.list_parent_indices(cells).filter(present(pc.list_flatten(cells)))
        return pc.is_in(pa.array(range(len(cells)), full.type), full)
    if pa.types.is_binary_view(kind) or pa.types.is_string_view(kind):
        return present(cells.cast(pa.large_binary()))
    if _has_length(kind):
        return pc.fill_null(pc.greater(pc.binary_length(cells), 0), False)
    return cells.is_valid()


def _has_length(kind: Any) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string)
    return any(test(kind) for test in tests)


def present_in_row_group(file: pq.ParquetFile, number: int, column: str) -> Iterator[bool]:
    """Yield for each cell of a column whether it is not empty; values are read only without statistics.

    Args:
        file: opened by `open_parquet`.
        number: number of the row group.
        column: name of the column, at the top level.
    """
    group = file.metadata.row_group(number)
    chunks = [group.column(index) for index in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    if all(_null_count(chunk) == chunk.num_values for chunk in chunks):
        return iter([False] * group.num_rows)
    if any(_in_every_row(chunk, column) for chunk in chunks):
        return iter([True] * group.num_rows)
    size = sum(chunk.total_uncompressed_size for chunk in chunks) // max(group.num_rows, 1)
    rows = min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(size, 1)) or 1
    batches = file.iter_batches(rows, row_groups=[number], columns=[column], use_threads=False)
    return (found for batch in batches for found in present(batch.column(0)).to_pylist())


def _null_count(chunk: Any) -> int | None:
    known = chunk.statistics
    return known.null_count if known is not None and known.has_null_count else None


def _in_every_row(chunk: Any, column: str) -> bool:
    """Return whether a column, or a field of its struct, is known to be in every row and never empty."""
    field = chunk.path_in_schema.removeprefix(column).removeprefix(".")
    known = chunk.statistics
    return "." not in field and _null_count(chunk) == 0 and known.has_min_max and known.min not in ("", b"")
