"""Checks of a data set: keys, images, and the policy for rejected rows."""

import base64
import io
import json

import fsspec
import pytest
from PIL import Image

from pipelines.data import images
from pipelines.data.rows import Message, Reject, TrainingRow
from pipelines.data.training_rows import apply_bad_row_policy, read_training_rows
from pipelines.shapes.files import ShapesConfig, write_shapes
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


def read(folder, rows, **options):
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return read_training_rows(str(path), **options)


def test_the_data_set_of_shapes_is_readable(tmp_path):
    write_shapes(ShapesConfig(output=tmp_path, train=5, validation=0, test=1))
    train = read_training_rows(str(tmp_path / "train.json"))
    test = read_training_rows(str(tmp_path / "test.json"))
    assert (len(train.rows), train.rejects) == (5, [])
    assert (len({row.task for row in test.rows}), test.rejects) == (6, [])


def test_relative_paths_start_at_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    absolute = {"image": str(folder / "blue.png"), "conversations": CONVERSATION}
    relative = {"image": "red.png", "conversations": CONVERSATION}
    data = read(elsewhere, [relative, absolute], image_root=str(folder))
    assert [first_pixel(row.images[0]) for row in data.rows] == [RED, BLUE]


def test_rows_with_repeated_ids_get_unique_keys(folder):
    ids = ["a", "a#2", "a", "a", "", None, "a#2"]
    data = read(folder, [{"id": i, "image": "red.png", "conversations": CONVERSATION} for i in ids])
    assert [row.key for row in data.rows] == ["a", "a#2", "a#3", "a#4", "data-5", "data-6", "a#2#2"]


# ------------------------------------------------------------------------------------------- images


def test_broken_images_are_found_by_decoding_them(folder):
    truncated = png(size=(200, 200))[:-60]
    (folder / "cut.png").write_bytes(truncated)
    (folder / "page.jpg").write_bytes(b"<html>Not found</html>")
    (folder / "large.png").write_bytes(png(size=(300, 300)))
    url = "data:image/png;base64," + base64.b64encode(truncated).decode()
    names = ["red.png", "cut.png", "page.jpg", "large.png", "gone.png", url, "blue.png"]
    rows = [{"id": name[:9], "image": name, "conversations": CONVERSATION} for name in names]
    data = read(folder, rows, max_pixels=50_000)
    assert [row.key for row in data.rows] == ["red.png", "blue.png"]
    found = [(r.source.rpartition(" ")[2], r.key, r.kind) for r in data.rejects]
    assert found == [
        ("2", "cut.png", "unreadable image"),
        ("3", "page.jpg", "unreadable image"),
        ("4", "large.png", "oversized image"),
        ("5", "gone.png", "missing image"),
        ("6", "data:imag", "unreadable image"),
    ]
    assert data.rejects[0].source == f"{folder / 'data.json'}: row 2"
    assert data.rejects[0].reason.startswith(f"image {folder / 'cut.png'} cannot be decoded: ")
    assert data.rejects[4].reason.startswith("image #1 of row data:imag cannot be decoded: ")


def test_checks_can_be_reduced(folder):
    (folder / "text.jpg").write_bytes(b"text")
    rows = [{"id": name, "image": name, "conversations": CONVERSATION} for name in ("gone.png", "text.jpg")]
    kept = {
        how: [row.key for row in read(folder, rows, check_images=how).rows]
        for how in ("decode", "exists", "none")
    }
    assert kept == {"decode": [], "exists": ["text.jpg"], "none": ["gone.png", "text.jpg"]}
    row = read(folder, rows, check_images="none").rows[0]
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        row.images[0].open()


def test_an_image_that_many_rows_show_is_decoded_once(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(images, "decode", lambda file, name, limit: opened.append(name))
    read(folder, [{"image": "red.png", "conversations": CONVERSATION}] * 600)
    assert len(opened) == 1


def test_every_image_of_a_row_is_checked(folder):
    conversation = [{"from": "human", "value": "<image><image>"}, CONVERSATION[1]]
    (reject,) = read(folder, [{"image": ["red.png", "gone.png"], "conversations": conversation}]).rejects
    assert "gone.png does not exist" in reject.reason


# ------------------------------------------------------------------------------------- the policy

ROW = TrainingRow("good", (), MESSAGES)
REJECTS = [Reject("data.json: row 1", "é", "missing image", "image é.png does not exist", ("train",))] + [
    Reject(f"data.json: row {n}", str(n), "conversation", "the conversation is empty") for n in range(2, 6)
]


def test_skip_writes_the_rejects_and_counts_them(tmp_path):
    path = tmp_path / "new" / "rejects.jsonl"
    assert apply_bad_row_policy([ROW], REJECTS, "skip", str(path)) == {"conversation": 4, "missing image": 1}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 5
    assert lines[0] == {
        "source": "data.json: row 1",
        "key": "é",
        "kind": "missing image",
        "reason": "image é.png does not exist",
        "data_sets": ["train"],
    }


def test_stop_names_the_first_few_and_writes_all(tmp_path):
    path = tmp_path / "rejects.jsonl"
    with pytest.raises(DataError) as caught:
        apply_bad_row_policy([ROW], REJECTS, "stop", str(path))
    message = str(caught.value)
    assert message.startswith("5 of 6 rows cannot be used (4 × conversation, 1 × missing image)")
    assert "data.json: row 1 (é): image é.png does not exist" in message
    assert "row 3" in message
    assert "row 4" not in message
    assert "and 2 more" in message
    assert str(path) in message
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_no_usable_row_is_an_error(tmp_path, policy):
    path = tmp_path / "rejects.jsonl"
    with pytest.raises(DataError, match=r"no usable row: all 5 rows are rejected \(4 × conversation"):
        apply_bad_row_policy([], REJECTS, policy, str(path))
    assert path.exists()
    with pytest.raises(DataError, match="no usable row: it is empty"):
        apply_bad_row_policy([], [], policy, str(path))


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_without_rejects_an_earlier_file_is_removed(tmp_path, policy):
    path = tmp_path / "rejects.jsonl"
    path.write_text("of an earlier run")
    assert apply_bad_row_policy([ROW], [], policy, str(path)) == {}
    assert not path.exists()


def test_rejects_can_be_written_to_a_url():
    apply_bad_row_policy([ROW], REJECTS, "skip", "memory://out/rejects.jsonl")
    fs = fsspec.filesystem("memory")
    assert fs.cat("/out/rejects.jsonl").count(b"\n") == 5
    fs.rm("/out", recursive=True)
