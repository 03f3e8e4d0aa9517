"""Open Arrow files: the file format (also Feather version 2) and the streams of Hugging Face datasets."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from pipelines.data.storage import locate, open_file
from skipvision.errors import DataError

_FILE_MAGIC = b"ARROW1"
_OLD_FEATHER = b"FEA1"


class ArrowTable:
    """The record batches of an Arrow file. A local file is mapped, so that its batches take no memory."""

    def __init__(self, path: str) -> None:
        """Read the schema. Raise `DataError` for Feather version 1, and `pa.ArrowException`."""
        name = locate(path)[1] if "://" not in path else None
        self._source: IO[bytes] | pa.NativeFile
        self._source = pa.memory_map(name) if name and Path(name).stat().st_size else open_file(path)
        if not isinstance(self._source, pa.NativeFile):
            weakref.finalize(self, self._source.close)
        magic = self._source.read(len(_FILE_MAGIC))
        self._source.seek(0)
        if magic.startswith(_OLD_FEATHER):
            raise DataError(f"{path} is a Feather file of version 1; write it again with version 2")
        self._is_file = magic == _FILE_MAGIC
        self._open()
        self.schema: pa.Schema = self._reader.schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield every batch from the beginning."""
        if self._is_file:
            yield from (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
            return
        self._source.seek(0)
        self._open()
        yield from self._reader

    def batch(self, number: int) -> pa.RecordBatch:
        """Return one batch; in the stream format, those before it are passed."""
        if self._is_file:
            return self._reader.get_batch(number)
        return next(batch for at, batch in enumerate(self.batches()) if at == number)

    def _open(self) -> None:
        opened = pa.ipc.open_file if self._is_file else pa.ipc.open_stream
        self._reader = opened(self._source)
