"""Every format of training rows: JSON, JSON lines, parquet; local and remote."""

import io
import json
import pickle

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data.images import FileImage
from pipelines.data.rows import Message, TrainingRow
from pipelines.data.training_rows import read_training_rows
from skipvision.errors import DataError

CONVERSATION = [
    {"from": "human", "value": "<image>\nWhat colour is it?"},
    {"from": "gpt", "value": "red"},
]
MESSAGES = (Message("user", "<image>\nWhat colour is it?"), Message("assistant", "red"))
RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(colour=RED, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def first_pixel(source):
    return source.open().getpixel((0, 0))


@pytest.fixture
def folder(tmp_path):
    """A folder with `red.png` and `blue.png`, for a data set."""
    (tmp_path / "red.png").write_bytes(png())
    (tmp_path / "blue.png").write_bytes(png(BLUE))
    return tmp_path


def read(folder, rows, name="data.json", **options):
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(
            rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path, row_group_size=2
        )
    else:
        lines = "\n".join(json.dumps(row) for row in rows)
        path.write_text(lines if name.endswith(".jsonl") else json.dumps(rows))
    return read_training_rows(str(path), **options)


def the_only_row(data):
    assert data.rejects == []
    (row,) = data.rows
    return row


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_llava_rows_in_every_container(folder, name):
    value = {"id": "a", "image": "red.png", "task": "colour", "conversations": CONVERSATION}
    row = the_only_row(read(folder, [value], name))
    assert row == TrainingRow("a", (FileImage(str(folder / "red.png")),), MESSAGES, "colour")
    assert first_pixel(row.images[0]) == RED


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_chat_rows_in_every_container(folder, name):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    row = the_only_row(read(folder, [{"id": 7, "images": ["red.png"], "messages": messages}], name))
    assert row.key == "7"
    assert row.messages == (Message("system", "Be brief."), *MESSAGES)
    assert first_pixel(row.images[0]) == RED


def test_json_lines_may_be_named_json(folder):
    row = {"image": "red.png", "conversations": CONVERSATION}
    (folder / "data.json").write_text(f"\n{json.dumps(row)}\n\n{json.dumps(row)}\n")
    assert [row.key for row in read_training_rows(str(folder / "data.json")).rows] == ["data-2", "data-4"]


def test_a_pattern_reads_all_files_in_order_with_unique_keys(folder):
    for shard in (2, 1):
        row = {"id": "a", "task": str(shard), "image": "red.png", "conversations": CONVERSATION}
        (folder / f"part-{shard}.jsonl").write_text(json.dumps(row))
    rows = read_training_rows(str(folder / "part-*.jsonl")).rows
    assert [(row.key, row.task) for row in rows] == [("a", "1"), ("a#2", "2")]


def test_rows_from_memory_and_any_other_fsspec_url():
    fs = fsspec.filesystem("memory")
    fs.pipe("/set/images/red.png", png())
    rows = [{"image": "images/red.png", "conversations": CONVERSATION}]
    fs.pipe("/set/data.json", json.dumps(rows).encode())
    table = pa.table({"image": [png(BLUE)], "conversations": [CONVERSATION]})
    with fs.open("/set/data.parquet", "wb") as file:
        pq.write_table(table, file)
    try:
        row = the_only_row(read_training_rows("memory://set/data.json"))
        assert str(row.images[0]) == "memory://set/images/red.png"
        assert first_pixel(row.images[0]) == RED
        assert first_pixel(the_only_row(read_training_rows("memory://set/*.parquet")).images[0]) == BLUE
        fs.rm("/set/images/red.png")
        for check in ("exists", "decode"):
            (reject,) = read_training_rows("memory://set/data.json", check_images=check).rejects
            assert reject.kind == "missing image"
    finally:
        fs.rm("/set", recursive=True)


# ------------------------------------------------------------------------------------------ parquet


IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("column", "kind", "cells"),
    [
        ("image", pa.binary(), [png(), png(BLUE), png()]),
        ("image", pa.large_binary(), [png(), png(BLUE), png()]),
        ("image", IMAGE_STRUCT, [{"bytes": b, "path": None} for b in (png(), png(BLUE), png())]),
        ("images", pa.list_(pa.binary()), [[png()], [png(BLUE)], [png()]]),
        ("images", pa.list_(IMAGE_STRUCT), [[{"bytes": png(c)}] for c in (RED, BLUE, RED)]),
        ("images", pa.list_(IMAGE_STRUCT), [[{"path": f"{c}.png"}] for c in ("red", "blue", "red")]),
        ("image", pa.string(), ["red.png", "blue.png", "red.png"]),
    ],
)
def test_parquet_images_of_every_kind_in_several_row_groups(folder, column, kind, cells):
    table = pa.table({column: pa.array(cells, kind), "conversations": [CONVERSATION] * 3})
    data = read(folder, table, "data.parquet")
    assert data.rejects == []
    assert [row.key for row in data.rows] == ["data-1", "data-2", "data-3"]
    assert [first_pixel(row.images[0]) for row in reversed(data.rows)] == [RED, BLUE, RED]


def test_parquet_rows_with_several_images_and_with_none(folder):
    conversations = [
        [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "two"}],
        [{"from": "human", "value": "none"}, {"from": "gpt", "value": "right"}],
    ]
    images_of = pa.array([[png(), png(BLUE)], None], pa.list_(pa.binary()))
    empty = pa.array([None, {"bytes": None, "path": None}], IMAGE_STRUCT)
    data = read(
        folder, pa.table({"images": images_of, "image": empty, "conversations": conversations}), "x.parquet"
    )
    assert data.rejects == []
    assert [[first_pixel(image) for image in row.images] for row in data.rows] == [[RED, BLUE], []]


def test_parquet_rows_refer_to_their_bytes(folder):
    big = png(size=(1000, 1000))
    assert len(big) > 2000
    row = the_only_row(read(folder, [{"image": big, "conversations": CONVERSATION}], "data.parquet"))
    assert len(pickle.dumps(row)) < 1000
    assert first_pixel(pickle.loads(pickle.dumps(row)).images[0]) == RED


def test_a_rewritten_parquet_file_is_read_again(folder):
    row = {"image": png(), "conversations": CONVERSATION}
    assert first_pixel(read(folder, [row], "data.parquet").rows[0].images[0]) == RED
    row["image"] = png(BLUE)
    assert first_pixel(read(folder, [row], "data.parquet").rows[0].images[0]) == BLUE


def test_rows_are_numbered_across_batches_of_a_row_group(folder):
    colours = [(i, 0, 0) for i in range(150)]
    table = pa.table({"image": [png(c) for c in colours], "conversations": [CONVERSATION] * 150})
    pq.write_table(table, folder / "data.parquet", row_group_size=140)
    rows = read_training_rows(str(folder / "data.parquet")).rows
    assert [first_pixel(row.images[0]) for row in rows] == colours


# --------------------------------------------------------------------------------- broken data sets


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"", r"suffix '\.csv'.*\.json, \.jsonl, \.ndjson, \.parquet"),
        ("data.json", b'[{"id": 1},', r"data\.json is not valid JSON.*line 1"),
        ("data.parquet", b"PAR1 no", r"data\.parquet is not a readable parquet file"),
        ("folder", None, r"folder is a folder; give a file in it, or a pattern such as .*/folder/\*\.jsonl"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_training_rows(str(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/data.json", "nowhere/data.json does not exist"),
        ("nowhere/*.json", "no file matches"),
        ("nosuch://bucket/data.json", "cannot be opened: Protocol not known: nosuch"),
    ],
)
def test_missing_sources(source, message):
    with pytest.raises(DataError, match=message):
        read_training_rows(source)


def test_parquet_without_conversations_names_its_columns(folder):
    with pytest.raises(DataError, match=r"neither `conversations` .*; its columns are image, texts"):
        read(folder, [{"image": b"", "texts": "?"}], "data.parquet")


def test_a_parquet_file_with_damaged_pages_is_an_error_of_ours(folder):
    read(folder, [{"image": png(), "conversations": CONVERSATION}], "data.parquet")
    raw = bytearray((folder / "data.parquet").read_bytes())
    raw[4:300] = bytes(296)
    (folder / "data.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"data\.parquet"):
        read_training_rows(str(folder / "data.parquet"))


def test_a_broken_line_of_json_rejects_one_row(folder):
    good = json.dumps({"image": "red.png", "conversations": CONVERSATION}).encode()
    broken = [b'{"id": 1, "image":', b"\xff\xfe{}", b"[" * 100_000]
    (folder / "data.jsonl").write_bytes(b"\n".join([good, *broken, good]))
    data = read_training_rows(str(folder / "data.jsonl"))
    assert [row.key for row in data.rows] == ["data-1", "data-5"]
    assert [reject.source[-6:] for reject in data.rejects] == ["line 2", "line 3", "line 4"]
    assert all(reject.kind == "broken record" for reject in data.rejects)
    assert all("not valid JSON" in reject.reason for reject in data.rejects)


def test_bad_rows_of_parquet_files_are_named_by_their_number(folder):
    table = [{"image": data, "conversations": CONVERSATION} for data in (png(), png()[:50], b"", png(BLUE))]
    data = read(folder, table, "data.parquet")
    assert [reject.source for reject in data.rejects] == [
        f"{folder / 'data.parquet'}: row {n}" for n in (2, 3)
    ]
    assert [reject.kind for reject in data.rejects] == ["unreadable image"] * 2
    assert [first_pixel(row.images[0]) for row in data.rows] == [RED, BLUE]
