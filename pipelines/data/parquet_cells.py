"""Single cells out of parquet files, with no more in memory than a few row groups or parts of large ones."""

from __future__ import annotations

import threading
from collections import deque
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

_WHOLE_BYTES = 128 * 2**20
"""A column of a row group up to this size is kept as a whole."""
_PART_ROWS = 64
_PARTS = 4
_READ_BYTES = 2**20

_lock = threading.Lock()


def read_cell(path: str, row_group: int, column: str, row: int) -> Any:
    """One value. Of the four row groups used last small ones are remembered whole, so any order is fast.

    A large one is read from its beginning, page by page: fast if rows are asked for in order, slow if not.
    """
    with _lock:  # threads that want the same row group wait for one to read it
        found = _column(path, row_group, column)
        if isinstance(found, _Parts):
            return found.cell(row)
    return found[row].as_py()


def forget_columns() -> None:
    """Make `read_cell` look at the files again."""
    _column.cache_clear()


@lru_cache(maxsize=4)
def _column(path: str, row_group: int, column: str) -> pa.ChunkedArray | _Parts:
    with fsspec.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        group = table.metadata.row_group(row_group)
        chunks = (group.column(number) for number in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
        if size <= _WHOLE_BYTES:
            return table.read_row_group(row_group, columns=[column])[column]
    return _Parts(path, row_group, column)


class _Parts:
    """A large column, read on from where it was last asked for; the last few parts stay."""

    def __init__(self, path: str, row_group: int, column: str) -> None:
        self._place = path, row_group, column
        self._rewind()

    def cell(self, row: int) -> Any:
        if self._parts and row < self._parts[0][0]:
            self._rewind()
        while True:
            for start, values in self._parts:
                if start <= row < start + len(values):
                    return values[row - start].as_py()
            values = next(self._batches).column(0)
            self._parts.append((self._next, values))
            self._next += len(values)

    def _rewind(self) -> None:
        path, row_group, column = self._place
        # Open until the parts are forgotten: the next part is read when it is asked for.
        file = fsspec.open(path, "rb").open()
        table = pq.ParquetFile(file, buffer_size=_READ_BYTES)
        self._batches = table.iter_batches(_PART_ROWS, row_groups=[row_group], columns=[column])
        self._parts: deque[tuple[int, pa.Array]] = deque(maxlen=_PARTS)
        self._next = 0
