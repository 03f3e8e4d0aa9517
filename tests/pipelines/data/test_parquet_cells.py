"""Cells are read correctly for any size of row group and any order."""

import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data import parquet_cells
from pipelines.data.parquet_cells import forget_columns, read_cell

ROWS = 700


@pytest.fixture
def file(tmp_path):
    values = [f"cell {row}".encode() * 20 for row in range(ROWS)]
    table = pa.table({"number": range(ROWS), "image": [{"bytes": value, "path": "x"} for value in values]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    forget_columns()
    yield str(tmp_path / "a.parquet")
    forget_columns()


@pytest.mark.parametrize("whole_bytes", [2**30, 0], ids=["small", "large"])
def test_cells_in_any_order(file, monkeypatch, whole_bytes):
    monkeypatch.setattr(parquet_cells, "_WHOLE_BYTES", whole_bytes)
    rows = [*range(0, ROWS, 3), *random.Random(0).sample(range(ROWS), 40)]
    for row in rows:
        group, place = divmod(row, 500)
        assert read_cell(file, group, "image", place)["bytes"] == f"cell {row}".encode() * 20
        assert read_cell(file, group, "number", place) == row


def test_a_large_row_group_is_read_once_in_order_and_never_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_cells, "_WHOLE_BYTES", 2**20)
    monkeypatch.setattr(parquet_cells, "_PART_ROWS", 8)
    opened = []
    real = pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: opened.append(1) or real(*a, **k))
    schema = pa.schema([("image", pa.binary())])
    # Pages and dictionaries, by default of a thousand rows, are read whole.
    options = {"use_dictionary": False, "write_batch_size": 8}
    with pq.ParquetWriter(tmp_path / "big.parquet", schema, **options) as writer:
        cells = [os.urandom(200_000) for _ in range(500)]
        writer.write_table(pa.table({"image": cells}))
    first = [cell[:8] for cell in cells]
    del cells
    before, most = pa.total_allocated_bytes(), 0
    for row in range(0, 500, 2):
        assert read_cell(str(tmp_path / "big.parquet"), 0, "image", row)[:8] == first[row]
        most = max(most, pa.total_allocated_bytes() - before)
    forget_columns()
    assert len(opened) == 2
    assert most < 20 * 2**20  # of 100 MB
