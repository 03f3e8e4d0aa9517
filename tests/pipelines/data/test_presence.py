"""Columns of videos are checked for presence without reading the videos."""

from __future__ import annotations

import io
import tracemalloc
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.columnar import table_rows
from pipelines.data.media import UNREAD, is_empty, needs_no_content
from pipelines.data.parquet_cells import open_parquet
from pipelines.data.presence import present, present_in_row_group

VIDEO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "bytes": (pa.binary(), [b"v" * 100, None, b""]),
    "bytes in every row": (pa.binary(), [b"v", b"w"]),
    "bytes in no row": (pa.binary(), [None, None]),
    "empty bytes in every row": (pa.binary(), [b"", b""]),
    "large bytes": (pa.large_binary(), [b"v", None, b""]),
    "bytes view": (pa.binary_view(), [b"v", None, b""]),
    "text": (pa.string(), ["a.mp4", None, ""]),
    "text view": (pa.string_view(), ["a.mp4", None, ""]),
    "large text": (pa.large_string(), ["a.mp4", None, ""]),
    "text in a dictionary": (pa.dictionary(pa.int32(), pa.string()), ["a.mp4", "", None]),
    "struct": (
        VIDEO,
        [{"bytes": b"v"}, {"path": "a.mp4"}, {"path": ""}, {"bytes": b"", "path": None}, {}, None],
    ),
    "struct in every row": (VIDEO, [{"bytes": b"v", "path": "a.mp4"}, {"bytes": None, "path": "b.mp4"}]),
    "struct in no row": (VIDEO, [None, {}]),
    "list of paths": (pa.list_(pa.string()), [["a.mp4"], [], None, [""], [None, "b"]]),
    "large list of bytes": (pa.large_list(pa.binary()), [[b"v"], [], None, [b""]]),
    "list of two": (pa.list_(pa.string(), 2), [["a", ""], ["", ""]]),
    "list of structs": (pa.list_(VIDEO), [[{"bytes": b"v"}], [], None, [{}], [{}, {"path": "b"}]]),
    "list of lists": (pa.list_(pa.list_(pa.string())), [[["a"]], [[]], [[""], ["b"]], [], None]),
    "number": (pa.int64(), [1, 0, None]),
    "nothing": (pa.null(), [None, None]),
}
"""Every type of column, and cells with and without content."""


@pytest.mark.parametrize("name", CELLS)
def test_presence_is_what_the_cells_say(name):
    kind, cells = CELLS[name]
    array = pa.array(cells, kind) if "dictionary" not in name else pa.array(cells).dictionary_encode()
    expected = [not is_empty(cell) for cell in array.to_pylist()]
    assert present(array).to_pylist() == expected
    assert present(array.slice(1)).to_pylist() == expected[1:]
    for statistics in (True, False):
        file = io.BytesIO()
        pq.write_table(pa.table({"other": [0] * len(array), "v": array}), file, write_statistics=statistics)
        assert list(present_in_row_group(open_parquet(file), 0, "v")) == expected


class Counted(io.BytesIO):
    """A file that counts what is read from it."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


ROWS, SIZE = 40, 2**20
"""The videos of a file: forty of them, of one megabyte each."""


def videos(*, statistics: bool, missing: bool) -> Counted:
    file = Counted()
    cells = [{"bytes": bytes([n]) * SIZE, "path": None if missing else f"{n}.mp4"} for n in range(ROWS)]
    cells[7] = None if missing else cells[7]
    table = pa.table({"video": pa.array(cells, VIDEO)})
    options = {"use_dictionary": False, "compression": "none", "write_batch_size": 1}  # pages of one video
    pq.write_table(table, file, write_statistics=statistics, **options)
    return file


@pytest.mark.parametrize(
    ("statistics", "missing", "read"), [(True, False, 0), (True, True, 1), (False, False, 1)]
)
def test_videos_are_not_held_in_memory_and_mostly_not_read(statistics, missing, read):
    file = videos(statistics=statistics, missing=missing)
    table = open_parquet(file)
    file.taken, base = 0, pa.total_allocated_bytes()
    tracemalloc.start()
    count = largest = 0
    for found in present_in_row_group(table, 0, "video"):
        count += found
        largest = max(largest, pa.total_allocated_bytes() - base)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == ROWS - missing
    assert file.taken <= (read + 0.1) * ROWS * SIZE
    assert max(largest, peak) < ROWS * SIZE * 0.6


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_the_rows_of_a_table_hold_marks_instead_of_videos(kind, tmp_path):
    table = pa.table({"id": ["a", "b", "c"], "Video": pa.array([{"bytes": b"v"}, None, {}], VIDEO)})
    file = str(tmp_path / f"rows.{kind}")
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=2)
    else:
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    rows = table_rows(file, kind, lambda names: names, [], 100, unread=needs_no_content)
    assert list(rows) == [
        {"id": "a", "Video": UNREAD},
        {"id": "b", "Video": None},
        {"id": "c", "Video": None},
    ]
