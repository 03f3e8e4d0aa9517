"""Every kind of input becomes a manifest with rows in order, unique keys, problems and images."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from pipelines.caption.config import InputSection
from pipelines.caption.manifest import Manifest, write_manifest
from pipelines.data.rows import Message
from skipvision.errors import ConfigError, DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(colour=RED, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def listed(tmp_path):
    """List inputs and read the manifest: (rows, facts)."""

    def list_inputs(source, shard_rows=3, **settings):
        path = tmp_path / "out-manifest"
        facts = write_manifest(InputSection(source=str(source), **settings), path, shard_rows)
        manifest = Manifest(path)
        assert manifest.rows == facts.rows
        assert manifest.shard_rows == shard_rows
        assert not list(tmp_path.glob(".*"))
        shards = [manifest.shard(number, 64_000_000) for number in range(manifest.shards)]
        assert list(map(len, shards)) == list(map(manifest.rows_in, range(manifest.shards)))
        rows = [row for shard in shards for row in shard]
        assert len({row.key for row in rows}) == len(rows)
        return rows, facts

    return list_inputs


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set/b/deep").mkdir(parents=True)
    (tmp_path / "set/.hidden").mkdir()
    for name, colour in {"a.png": RED, "b/1.PNG": BLUE, "b/deep/2.png": RED, ".hidden/3.png": RED}.items():
        (tmp_path / "set" / name).write_bytes(png(colour))
    (tmp_path / "set/.also.png").write_bytes(png())
    (tmp_path / "set/notes.txt").write_text("no image")
    return tmp_path / "set"


def first_pixel(row):
    return row.images[0].open().getpixel((0, 0))


def keys(rows):
    return [row.key for row in rows]


def problems(rows):
    return {row.key: row.problem.kind for row in rows if row.problem}


# -------------------------------------------------------------------------------------------- files


def test_a_folder_is_searched_in_order_and_other_files_are_counted(folder, listed):
    rows, facts = listed(folder, prompt="What is in {stem}?", system="Be brief.")
    assert keys(rows) == ["a.png", "b/1.PNG", "b/deep/2.png"]
    assert rows[1].messages == (Message("system", "Be brief."), Message("user", "<image>What is in 1?"))
    assert first_pixel(rows[1]) == BLUE
    assert facts.passed_over == {".txt": 1}
    assert facts.problems == {}


def test_a_folder_at_a_url_is_read_like_a_local_one(folder, listed):
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/set", recursive=True)
    try:
        rows, _ = listed("memory://set")
        assert keys(rows) == ["a.png", "b/1.PNG", "b/deep/2.png"]
        assert str(rows[1].images[0]).startswith("memory://")
        assert first_pixel(rows[1]) == BLUE
    finally:
        fs.rm("/set", recursive=True)
    assert keys(listed(f"file://{folder}")[0]) == ["a.png", "b/1.PNG", "b/deep/2.png"]


def test_a_pattern_takes_every_file_that_it_matches(folder, listed):
    rows, _ = listed(folder / "b" / "*.*")
    assert keys(rows) == ["1.PNG"]
    rows, _ = listed(folder / "*.txt")
    assert keys(rows) == ["notes.txt"]  # opening it reports that it is no image
    assert keys(listed(folder / "**" / "*.png", limit=2)[0]) == [".also.png", ".hidden/3.png"]


def test_an_error_without_inputs_counts_the_skipped_files(folder, listed, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"nothing to caption \(files skipped: 1 × \.txt"):
        listed(tmp_path / "texts")
    with pytest.raises(DataError, match="no file matches"):
        listed(folder / "*.webp")
    with pytest.raises(DataError, match="does not exist"):
        listed(tmp_path / "gone.jsonl")


# ---------------------------------------------------------------------------------------- json lines


def test_json_lines_with_columns_keys_and_broken_rows(tmp_path, listed):
    (tmp_path / "red.png").write_bytes(png())
    lines = [
        {"name": "one", "image": "red.png", "category": " cat "},
        {"name": "two", "image": "red.png"},
        {"name": None, "image": "red.png", "category": "dog"},
        {"name": "four", "category": "dog"},
        {"name": "five", "image": 7, "category": "dog"},
        {"name": 6, "image": ["red.png", "red.png"], "category": 3.5},
        {"name": "one", "image": "red.png", "category": "dog"},
        ["not", "an", "object"],
    ]
    text = "\n".join(map(json.dumps, lines)) + "\nnot json\n"
    (tmp_path / "rows.jsonl").write_text(text)
    rows, facts = listed(tmp_path / "rows.jsonl", prompt="Describe the {category}{{}}.", key="name")
    assert keys(rows) == ["one", "two", "rows-3", "four", "five", "6", "one#2", "rows-8", "rows-9"]
    assert problems(rows) == {
        "two": "broken record",
        "rows-3": "broken record",
        "four": "missing image",
        "five": "broken record",
        "one#2": "duplicate key",
        "rows-8": "broken record",
        "rows-9": "broken record",
    }
    assert facts.problems == {"broken record": 5, "missing image": 1, "duplicate key": 1}
    assert rows[0].messages == (Message("user", "<image>Describe the cat{}."),)
    assert rows[5].messages == (Message("user", "<image><image>Describe the 3.5{}."),)
    assert "column `category` of the prompt has no value" in rows[1].problem.reason
    assert "rows.jsonl: line 1" in rows[6].problem.reason
    assert rows[8].source.endswith("rows.jsonl: line 9")


def test_half_a_character_makes_an_error_row(tmp_path, listed):
    lines = ['{"id": "a\\ud800", "image": "x.png"}', '{"id": "b", "image": "x.png", "title": "\\udfff"}']
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, '{"id": "c", "image": "x.png", "title": "t"}']))
    assert problems(listed(tmp_path / "rows.jsonl")[0]) == {"a\\ud800": "broken record"}
    rows, _ = listed(tmp_path / "rows.jsonl", prompt="{title}")
    assert problems(rows) == {"a\\ud800": "broken record", "b": "broken record"}


def test_a_file_whose_name_is_not_unicode_is_an_error_row(tmp_path, listed):
    (tmp_path / "set").mkdir()
    with open(os.fsencode(tmp_path / "set") + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123
        file.write(png())
    rows, _ = listed(tmp_path / "set")
    assert problems(rows) == {"caf\\udce9.png": "broken record"}


def test_a_placeholder_in_a_value_is_no_image(tmp_path, listed):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png", "title": "an <image> of <image>"}))
    rows, _ = listed(tmp_path / "rows.jsonl", prompt="Describe {title}.")
    assert problems(rows) == {"rows-1": "placeholders"}


def test_the_prompt_decides_the_position_of_images(tmp_path, listed):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": ["a.png", "b.png"]}))
    rows, _ = listed(tmp_path / "rows.jsonl", prompt="From <image> to <image>: what changed?")
    assert rows[0].messages[0].text == "From <image> to <image>: what changed?"
    rows, _ = listed(tmp_path / "rows.jsonl", prompt="What is in <image>?")
    assert problems(rows) == {"rows-1": "placeholders"}


def test_llava_json_has_its_own_questions(tmp_path, listed):
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "a cat"},
        {"from": "human", "value": "What colour?"},
        {"from": "gpt", "value": "red"},
    ]
    values = [
        {"id": "a", "image": "red.png", "conversations": turns},
        {"id": "b", "image": "red.png", "conversations": turns[1:2]},
        {"id": "c", "image": "red.png", "conversations": turns[2:3]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(values))
    rows, _ = listed(tmp_path / "data.json", prompt=None, image_root="/pictures")
    assert rows[0].messages == (
        Message("user", "<image>\nWhat is it?"),
        Message("assistant", "a cat"),
        Message("user", "What colour?"),
    )
    assert str(rows[0].images[0]) == "/pictures/red.png"
    assert problems(rows) == {"b": "conversation", "c": "placeholders"}
    rows, _ = listed(tmp_path / "data.json")
    assert rows[2].messages == (Message("user", "<image>Describe the image."),)


def test_a_file_name_that_is_not_utf_8_is_an_error_row_with_the_remedy(tmp_path, listed):
    (tmp_path / "a.png").touch()
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    rows, _ = listed(tmp_path)
    bad = next(row.problem for row in rows if row.problem)
    assert (len(rows), bad.kind) == (2, "broken record")
    assert "latin\\udce9.png is not UTF-8: rename it" in bad.reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "Describe the {category}."}, "input.prompt names column 'category'"),
        ({"key": "uid"}, "input.key names column 'uid'"),
        ({"image": "picture"}, "input.image names column 'picture'"),
        ({"prompt": None}, "neither `conversations` nor `messages`"),
    ],
)
def test_columns_that_no_row_has_are_mistakes_in_the_settings(tmp_path, listed, settings, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "image": "a.png"}))
    with pytest.raises(ConfigError, match=message):
        listed(tmp_path / "rows.jsonl", **settings)


@pytest.mark.parametrize("prompt", ["{0}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a", "a}"])
def test_a_prompt_may_only_name_columns(prompt):
    with pytest.raises(ValidationError, match="prompt"):
        InputSection(source="x", prompt=prompt)


# ------------------------------------------------------------------------------------------ parquet


@pytest.mark.parametrize(
    "cells",
    [
        [png(RED), png(BLUE), None],
        [{"bytes": png(RED), "path": "a.png"}, {"bytes": png(BLUE), "path": None}, None],
        [[png(RED)], [png(BLUE)], []],
        ["red.png", "blue.png", None],
    ],
    ids=["bytes", "struct", "list", "paths"],
)
def test_images_in_parquet_in_every_representation(tmp_path, listed, cells):
    (tmp_path / "red.png").write_bytes(png())
    (tmp_path / "blue.png").write_bytes(png(BLUE))
    table = pa.table({"uid": [1, 2, 3], "picture": cells, "other": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "data.parquet", row_group_size=2)
    rows, _ = listed(tmp_path / "data.parquet", key="uid", image="picture", prompt="{other}?")
    assert keys(rows) == ["1", "2", "3"]
    assert [first_pixel(row) for row in rows[:2]] == [RED, BLUE]
    assert rows[1].messages[0].text == "<image>y?"
    if rows[2].problem is None:  # found when it is opened
        with pytest.raises(DataError, match="is null"):
            rows[2].images[0].open()
    else:
        assert rows[2].problem.kind == "missing image"


def test_image_bytes_are_not_read_to_list_them(tmp_path, listed, monkeypatch):
    table = pa.table({"id": ["a"], "image": [png()]})
    pq.write_table(table, tmp_path / "data.parquet")
    read = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda *args, columns, **more: read.extend(columns) or batches(*args, columns=columns, **more),
    )
    rows, _ = listed(tmp_path / "data.parquet")
    assert read == ["id"]
    assert first_pixel(rows[0]) == RED


def test_namesakes_in_different_folders_have_different_keys(tmp_path, listed):
    for part in ("x", "y"):
        (tmp_path / part).mkdir()
        pq.write_table(pa.table({"image": [png(), png()]}), tmp_path / part / "data.parquet")
    rows, _ = listed(tmp_path / "*" / "data.parquet")
    assert keys(rows) == ["x/data-1", "x/data-2", "y/data-1", "y/data-2"]


# --------------------------------------------------------------------------------------------- tars


def make_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_tars(tmp_path, listed):
    members = {
        "d/01.jpg": png(RED),
        "d/01.json": b'{"category": "cat", "other": 1}',
        "d/02.json": b'{"category": "dog"}',
        "d/02.png": png(BLUE),
        "d/03.json": b'{"category": "bird"}',
        "d/04.jpg": png(),
        "d/04.png": png(),
        "d/05.json": b"[",
        "d/05.jpg": png(),
        "d/06.txt": b"fish",
        "d/06.jpg": png(),
    }
    make_tar(tmp_path / "00.tar", members)
    rows, _ = listed(tmp_path / "*.tar", prompt="A {category}?")
    assert keys(rows) == [f"d/0{number}" for number in range(1, 7)]
    assert [first_pixel(row) for row in rows[:2]] == [RED, BLUE]
    assert rows[1].messages[0].text == "<image>A dog?"
    assert problems(rows) == {
        "d/03": "missing image",
        "d/04": "broken record",
        "d/05": "broken record",
        "d/06": "broken record",
    }
    rows, _ = listed(tmp_path / "*.tar", prompt="A picture?", image="jpg")
    assert "d/04" not in problems(rows)
    rows, _ = listed(tmp_path / "*.tar", prompt="A {txt}?", image="jpg")
    assert rows[5].messages[0].text == "<image>A fish?"


@pytest.mark.parametrize("keep", [512 + 20, 1024 + 100])
def test_a_tar_that_is_cut_off_ends_in_an_error_row(tmp_path, listed, keep):
    make_tar(tmp_path / "00.tar", {"a.png": png(), "b.png": png()})
    data = (tmp_path / "00.tar").read_bytes()
    (tmp_path / "00.tar").write_bytes(data[:keep])
    rows, _ = listed(tmp_path / "00.tar")
    assert keys(rows)[0] == "a"
    assert rows[-1].problem.kind == "broken record"
    assert "tar" in rows[-1].problem.reason


def test_a_file_that_is_no_tar_is_refused(tmp_path, listed):
    (tmp_path / "00.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match="not a readable uncompressed tar"):
        listed(tmp_path / "00.tar")


# -------------------------------------------------------------------------------------------- keys


def test_new_names_of_repeated_keys_are_unique(tmp_path, listed):
    given = ["a", "a", "a#2", "a", "b", "a#2", "a#3"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"id": k, "image": "x.png"}) for k in given))
    rows, facts = listed(tmp_path / "rows.jsonl", shard_rows=2)
    assert keys(rows) == ["a", "a#4", "a#2", "a#5", "b", "a#2#2", "a#3"]
    assert facts.problems == {"duplicate key": 3}


def test_the_same_inputs_give_the_same_manifest(folder, tmp_path):
    for name in ("one", "two"):
        write_manifest(InputSection(source=str(folder)), tmp_path / name, 2)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert one.keys() == {"000000.parquet", "index.json"}


def test_listing_takes_the_memory_of_a_shard(tmp_path, monkeypatch):
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(10_000):
            file.write(json.dumps({"id": f"row {number}", "image": f"pictures/{number}.png"}) + "\n")
    settings = InputSection(source=str(tmp_path / "rows.jsonl"))
    tracemalloc.start()
    try:
        write_manifest(settings, tmp_path / "manifest", 100)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20  # all rows as objects are three times as much
