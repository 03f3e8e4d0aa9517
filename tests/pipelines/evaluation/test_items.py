"""Files of scored items."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.evaluation.items import Item, read_items, read_systems, write_items
from skipvision.errors import DataError

ITEMS = [
    Item("MMStar", "7", "full", "math", "g7", "B", 1.0, log_probability=-0.25),
    Item("MMStar", "8", "full", "", "g8", "", 0.0, error="corrupt: the image is cut off"),
]


def test_items_and_systems_survive_a_file(tmp_path):
    path = tmp_path / "new folder" / "items.parquet"
    write_items(path, ITEMS[:1])
    assert read_systems(path) == {}
    systems = {"full": {"model": "models/base", "adapter": None, "skip": "{}"}}
    write_items(path, ITEMS, systems)
    assert read_items(path) == ITEMS
    assert [item.log_probability for item in read_items(path)] == [-0.25, None]
    assert read_systems(path) == systems
    assert [file.name for file in path.parent.iterdir()] == ["items.parquet"]


def test_files_of_earlier_versions_have_no_probabilities(tmp_path):
    path = tmp_path / "items.parquet"
    write_items(path, ITEMS)
    pq.write_table(pq.read_table(path).drop_columns(["log_probability"]), path)
    assert read_items(path) == ITEMS
    assert [item.log_probability for item in read_items(path)] == [None, None]


def test_files_of_another_format_raise(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("index,score")
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "text.parquet")
    pq.write_table(pa.table({"index": ["1"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="not those of scored items"):
        read_items(tmp_path / "other.parquet")
