"""Formats by their names: compressed rows are read, others are refused with the formats that are read."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.caption.config import InputSection
from pipelines.caption.manifest import Manifest, write_manifest
from pipelines.data.formats import Format, format_of, name_of_rows
from pipelines.data.training_rows import read_training_rows
from pipelines.score.dataset import read_dataset
from skipvision.errors import DataError

CONVERSATION = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
ROWS = [{"image": "red.png", "conversations": CONVERSATION}] * 3


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def listed(path):
    manifest = path.parent / "manifest"
    write_manifest(InputSection(source=str(path)), manifest, 100)
    return Manifest(manifest).shard(0, 10**6)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "red.png").write_bytes(png())
    return tmp_path


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("rows.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("rows.json", json.dumps(ROWS)),
        ("Rows.v2.JSON", "\n".join(map(json.dumps, ROWS))),
    ],
)
def test_rows_are_read_with_any_compression(folder, name, content, suffix):
    path = folder / (name + suffix.upper() if name.isupper() else name + suffix)
    path.write_bytes(COMPRESS[suffix](content.encode()))
    data = read_training_rows(str(path))
    assert (len(data.rows), data.rejects) == (3, [])
    stem = name.rpartition(".")[0]
    assert [row.key for row in data.rows] == [f"{stem}-{number}" for number in (1, 2, 3)]
    rows = listed(path)
    assert [row.key for row in rows] == [f"{stem}-{number}" for number in (1, 2, 3)]
    assert rows[2].images[0].open().size == (8, 6)


@pytest.mark.parametrize(
    "suffix", [*(f".tar{suffix}" for suffix in COMPRESS), ".tgz", ".tbz2", ".txz", ".tzst"]
)
def test_tars_are_read_with_any_compression(folder, suffix):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for number in range(3):
            for name, data in ((f"d/{number}.png", png()), (f"d/{number}.json", b'{"id": 1}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    how = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}.get(suffix, suffix[4:])
    (folder / f"shard{suffix}").write_bytes(COMPRESS[how](plain.getvalue()))
    rows = listed(folder / f"shard{suffix}")
    assert [row.problem for row in rows if row.problem and row.problem.kind != "duplicate key"] == []
    assert rows[0].images[0].open().size == (8, 6)
    assert "d/0.png" in str(rows[0].images[0])
    assert len(rows) == 3


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut off", "flipped", "not compressed", "empty"])
def test_damaged_compression_is_reported(folder, suffix, damage):
    if (suffix, damage) == (".zst", "flipped"):
        pytest.skip("its frames have no checksum unless the writer adds one")
    lines = "\n".join(json.dumps({**row, "id": str(hash((damage, n)))}) for n in range(900) for row in ROWS)
    data = COMPRESS[suffix](lines.encode())
    data = {
        "cut off": data[: len(data) // 2],
        "flipped": data[:200] + bytes(byte ^ 255 for byte in data[200:300]) + data[300:],
        "not compressed": lines.encode(),
        "empty": b"",
    }[damage]
    path = folder / f"rows.jsonl{suffix}"
    path.write_bytes(data)
    if damage == "empty" and suffix in (".gz", ".zst"):  # a valid file of no rows
        assert read_training_rows(str(path)).rows == []
        return
    with pytest.raises(DataError, match=r"damaged or cut off|cannot be read") as caught:
        read_training_rows(str(path), check_images="none")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz", ".tar.zst", ".tar"])
def test_a_tar_that_is_cut_off_keeps_its_first_rows(folder, suffix):
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for number in range(40):
            data = Image.effect_noise((60, 60), 90)
            content = io.BytesIO()
            data.save(content, "PNG")
            info = tarfile.TarInfo(f"{number:02}.png")
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    data = COMPRESS[suffix[4:]](plain.getvalue())
    (folder / f"a{suffix}").write_bytes(data[: len(data) // 2])
    if suffix == ".tar.zst":
        with pytest.raises(DataError, match="Truncated compressed stream"):
            listed(folder / f"a{suffix}")
        return
    rows = listed(folder / f"a{suffix}")
    assert rows[0].images[0].open().size == (60, 60)
    assert "tar" in rows[-1].problem.reason
    assert 10 < len(rows) < 30


REFUSED = [
    "a.csv", "a.CSV", "a.zip", "a.7z", "a.xlsx", "a.h5", "a.npz", "a.pkl", "a.tfrecord", "a.csv.gz", "a.gz",
    "a.mp4", "a.heic", "a.svg", "a.pdf", "a.txt", "a", "a.unknown", "a.yaml",
]  # fmt: skip


@pytest.mark.parametrize("name", [*REFUSED, "a.parquet.gz", "a.tsv.gz", "a.arrow.zst"])
def test_a_single_file_of_another_format_is_refused_with_the_formats_that_are_read(folder, name):
    (folder / name).write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(DataError) as caught:
        listed(folder / name)
    assert str(folder / name) in str(caught.value)
    assert ".jsonl" in str(caught.value) or "decompress it first" in str(caught.value)
    with pytest.raises(DataError) as caught:
        read_training_rows(str(folder / name))
    assert ".jsonl" in str(caught.value) or "decompress it first" in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.zip", "a.tsv.gz", "a.jsonl", "a.parquet"])
def test_a_file_of_questions_must_be_a_table(folder, name):
    (folder / name).write_bytes(b"index,question\n1,what\n")
    with pytest.raises(DataError, match=r"suffix.*\.tsv|decompress it first"):
        read_dataset("Mine", str(folder / name), rule="vqa")


def test_patterns_that_match_only_other_formats_are_refused(folder):
    (folder / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"suffix '\.csv'"):
        listed(folder / "*.csv")
    (folder / "b.png").write_bytes(png())
    kinds = {row.key: row.problem for row in listed(folder / "[ab]*.*")}
    assert kinds == {"a.csv": None, "b.png": None}  # the first becomes an error row when it is opened


@pytest.mark.parametrize("name", ["image", "image.php", "photo.unknown", "photo.txt"])
def test_a_single_image_may_have_any_other_name(folder, name):
    (folder / name).write_bytes(png())
    (row,) = listed(folder / name)
    assert row.images[0].open().size == (8, 6)


@pytest.mark.parametrize("content", [b"", b"ARROW1 but no more", b"\xff" * 40, b"FEA1" + bytes(40)])
def test_a_damaged_arrow_file_is_reported(folder, content):
    (folder / "a.arrow").write_bytes(content)
    for read in (lambda path: read_training_rows(str(path)), listed):
        with pytest.raises(DataError, match=r"a\.arrow"):
            read(folder / "a.arrow")


@pytest.mark.parametrize(
    ("name", "kind", "stem"),
    [
        ("a.jsonl", Format("jsonl"), "a"),
        ("d/a.b.JSONL.GZ", Format("jsonl", "gz"), "d/a.b"),
        ("a.tgz", Format("tar", "gz"), "a"),
        ("a.tar.zst", Format("tar", "zst"), "a"),
        ("x.gz/a.feather", Format("arrow"), "x.gz/a"),
        ("a.csv.gz", None, "a.csv.gz"),
        ("a.png", None, "a.png"),
        ("a", None, "a"),
        (".jsonl", None, ".jsonl"),
    ],
)
def test_formats_of_names(name, kind, stem):
    assert (format_of(name), name_of_rows(name)) == (kind, stem)
