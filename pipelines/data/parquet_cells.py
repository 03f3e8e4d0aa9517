"""Read single cells of parquet and Arrow files; memory holds a few row groups, or parts of large ones."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.arrow_files import ArrowTable
from pipelines.data.storage import forget_downloads, open_file

_WHOLE_BYTES = 128 * 2**20
"""A column of a row group up to this size (bytes) is cached whole."""
_PART_ROWS = 64
_PARTS = 4
_READ_BYTES = 2**20
_PARQUET_MAGIC = b"PAR1"

_lock = threading.Lock()


def read_cell(path: str, row_group: int, column: str, row: int) -> Any:
    """Return one value.

    The last four columns of row groups are cached. Small ones are cached whole, so any order of rows is fast.
    Large ones are read page by page from their beginning, which is fast only in the order of the rows. Of an
    Arrow file, ``row_group`` is the number of a record batch.
    """
    with _lock:  # one thread reads a row group; others that need it wait
        found = _column(path, row_group, column)
        if isinstance(found, _Parts):
            return found.cell(row)
    return found[row].as_py()


def open_parquet(file: Any) -> pq.ParquetFile:
    """Open a parquet file of which each column is read page by page; by default Arrow buffers it whole."""
    return pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)


def forget_columns() -> None:
    """Clear the cache of `read_cell`, so that changed files are read again."""
    _column.cache_clear()
    forget_downloads()


@lru_cache(maxsize=4)
def _column(path: str, row_group: int, column: str) -> pa.ChunkedArray | pa.Array | _Parts:
    with open_file(path) as file:
        is_parquet = file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
        file.seek(0)
        if not is_parquet:
            return ArrowTable(path).batch(row_group).column(column)
        table = pq.ParquetFile(file)
        group = table.metadata.row_group(row_group)
        chunks = (group.column(number) for number in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
        if size <= _WHOLE_BYTES:
            return table.read_row_group(row_group, columns=[column])[column]
    return _Parts(path, row_group, column)


class _Parts:
    """A large column, read in parts. Reading continues after the last part; a few parts are cached."""

    def __init__(self, path: str, row_group: int, column: str) -> None:
        self._place = path, row_group, column
        self._close: Callable[[], object] = lambda: None
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
        # The file stays open for the next part until this object is dropped from the cache.
        self._close()
        file = open_file(path)
        self._close = weakref.finalize(self, file.close)
        table = open_parquet(file)
        self._batches = table.iter_batches(_PART_ROWS, row_groups=[row_group], columns=[column])
        self._parts: deque[tuple[int, pa.Array]] = deque(maxlen=_PARTS)
        self._next = 0
