"""Every kind of image cell gives the same images to training, captioning and scoring."""

import io
import json

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.caption.config import InputSection
from pipelines.caption.manifest import Manifest, write_manifest
from pipelines.data.training_rows import read_training_rows
from pipelines.score.dataset import read_dataset
from tests.pipelines.data.image_cells import BLUE, CELLS, RED, in_table

CONVERSATION = [{"from": "human", "value": "{}What?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    (tmp_path / "sub/été #1 100%.png").write_bytes(BLUE)
    fs = fsspec.filesystem("memory")
    fs.pipe("/cells/red.png", RED)
    yield tmp_path
    fs.rm("/cells", recursive=True)


def parquet(path, table):
    pq.write_table(table, path)


def parquet_without_statistics(path, table):
    pq.write_table(table, path, write_statistics=False)


def arrow_file(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def arrow_stream(path, table):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def feather(path, table):
    pyarrow.feather.write_feather(table, path, compression="zstd")


def trained(path):
    data = read_training_rows(str(path))
    assert data.rejects == []
    return [row.images for row in data.rows]


def captioned(path):
    manifest = path.parent / "manifest"
    write_manifest(InputSection(source=str(path)), manifest, 100)
    rows = Manifest(manifest).shard(0, 10**6)
    assert {row.problem.kind for row in rows if row.problem} <= {"missing image"}
    return [() if row.problem else row.images for row in rows]


def contents(images):
    found = []
    for image in images:
        assert image.open().size == (8, 6)
        found.append(image.read())
    return found


@pytest.mark.parametrize("write", [parquet, parquet_without_statistics, arrow_file, arrow_stream, feather])
@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("cell", CELLS)
def test_tables_of_rows(folder, cell, column, write):
    kind, value, expected = CELLS[cell]
    turns = [{**turn, "value": turn["value"].format("<image>" * len(expected))} for turn in CONVERSATION]
    try:
        cells = pa.array([value] * 3, kind)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError):
        plain = pa.array([value] * 3, kind.value_type if pa.types.is_dictionary(kind) else None)
        cells = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    path = folder / ("rows.parquet" if write.__name__.startswith("parquet") else "rows.arrow")
    try:
        write(path, pa.table({"id": ["a", "b", "c"], column: cells, "conversations": [turns] * 3}))
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"the format cannot hold it: {error}")
    for read in (trained, captioned):
        assert [contents(images) for images in read(path)] == [expected] * 3


@pytest.mark.parametrize("cell", [name for name in CELLS if CELLS[name][2] and in_table(CELLS[name][1])])
def test_tables_of_questions(folder, cell):
    columns = in_table(CELLS[cell][1])
    row = {"index": "1", "question": "What?", "answer": "red", **columns}
    quoted = ['"' + text.replace('"', '""') + '"' for text in row.values()]
    (folder / "Mine.tsv").write_text("\t".join(row) + "\n" + "\t".join(quoted) + "\n")
    (question,) = read_dataset("Mine", str(folder / "Mine.tsv"), rule="vqa").questions
    assert question.problem is None
    assert contents(question.images) == CELLS[cell][2]
    assert [contents(images) for images in captioned(folder / "Mine.tsv")] == [CELLS[cell][2]]


def test_rows_of_one_group_may_mix_bytes_and_paths(folder):
    kind = CELLS["struct with a path"][0]
    cells = [{"bytes": RED, "path": "x"}, {"bytes": None, "path": "blue.png"}, None]
    turns = [
        [{**t, "value": t["value"].format("<image>" * (cell is not None))} for t in CONVERSATION]
        for cell in cells
    ]
    pq.write_table(
        pa.table({"image": pa.array(cells, kind), "conversations": turns}), folder / "rows.parquet"
    )
    for read in (trained, captioned):
        assert [contents(images) for images in read(folder / "rows.parquet")] == [[RED], [BLUE], []]


def test_cells_of_json_are_those_of_tables(folder):
    for name, (_, value, expected) in CELLS.items():
        try:
            text = json.dumps({"image": value, "conversations": CONVERSATION})
        except TypeError:  # bytes
            continue
        (folder / "rows.jsonl").write_text(text.replace("{}", "<image>" * len(expected)))
        for read in (trained, captioned):
            assert [contents(images) for images in read(folder / "rows.jsonl")] == [expected], name


def test_a_large_arrow_file_is_read_in_any_order(folder):
    def image(number):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), (number, 0, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    cells = [image(number) for number in range(9)]
    turns = [{**turn, "value": turn["value"].format("<image>")} for turn in CONVERSATION]
    for write in (arrow_file, arrow_stream):
        write(folder / "rows.arrow", pa.table({"image": cells, "conversations": [turns] * 9}))
        images = [images[0] for images in trained(folder / "rows.arrow")]
        for number in (8, 0, 5, 4, 3, 7):
            assert images[number].read() == cells[number]
