"""Tables with base64 images, valid and broken."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.caption.config import InputSection
from pipelines.caption.manifest import Manifest, write_manifest
from pipelines.data.images import ImageError
from pipelines.data.instructions import WHOLE_QUESTION
from pipelines.data.tsv_records import tsv_records
from pipelines.score.dataset import read_dataset
from pipelines.score.points import score_answers
from pipelines.shapes.files import ShapesConfig, write_shapes
from skipvision.errors import ConfigError, DataError
from tests.pipelines.score.tables import CHOICE, png, table


def records(path: Path) -> list:
    return list(tsv_records(str(path), "table", ("image",), 10**6))


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6))
def test_texts_survive_the_csv_module(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("tsv") / "table.tsv"
    rows = [("x" + first, second, third) for first, second, third in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([("a", "b", "c"), *rows])
    assert [tuple(record.value[name] for name in "abc") for record in records(path)] == rows


def test_images_may_be_given_in_any_form(tmp_path):
    one, two = png(1), png(2)
    rows = [
        {"index": 1, "question": "later row", "image": 2},
        {"index": 2, "question": 'says "hi"\tand\nmore', "image": one},
        {"index": 3, "question": "a Python list", "image": str([one, two])},
        {"index": 4, "question": "a JSON list", "image": json.dumps([one, two])},
    ]
    path = table(tmp_path / "table.tsv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n4\t", b"\r\n4\t"))
    found = [[image.open().tobytes() for image in record.value["image"]] for record in records(path)]
    first, second = found[2]
    assert found == [[first], [first], [first, second], [first, second]]
    assert first != second
    digests = [record.value["image_digest"] for record in records(path)]
    assert digests[0] == digests[1] != digests[2]


def test_the_whole_question_has_its_hint_options_and_numbered_images(tmp_path):
    question = "Is <image 2> like <image 1>?"
    row = {
        "index": 1,
        "image": str([png(1), png(2)]),
        "hint": "Look.",
        **CHOICE,
        "question": question,
        "B": "",
    }
    (record,) = records(table(tmp_path / "table.tsv", [row]))
    assert record.value[WHOLE_QUESTION] == "Hint: Look.\nIs <image> like <image>?\nA. cat"
    assert [image.name for image in record.value["image"]] == ["#2 of row 1", "#1 of row 1"]


def test_paths_of_images_start_from_the_folder_of_the_table(tmp_path):
    row = {"index": 1, "image_path": "['a.png', 'b.png']", "question": "?", "answer": "x"}
    dataset = read_dataset("mine", str(table(tmp_path / "table.tsv", [row])), rule="exact")
    assert [image.path for image in dataset.questions[0].images] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"1\tx\n", "2 fields, but the header has 3"),
        (b"1\tx\ty\tz\n", "4 fields, but the header has 3"),
        (b"1\t9\t?\n", "neither base64 nor the index of a row"),
        (b"1\t\t\xff\n", "not valid UTF-8"),
        (b"1\t" + png().encode() + b"\t<image 2>?\n", "names <image 2>, but the row has 1"),
    ],
)
def test_broken_rows_are_reported_and_count_as_wrong(line, problem, tmp_path):
    path = tmp_path / "table.tsv"
    path.write_bytes(b"index\timage\tquestion\n" + line)
    assert problem in records(path)[0].problem
    good = b"good\t%b\tx\ty\n" % png().encode()
    path.write_bytes(b"index\timage\tquestion\tanswer\n" + line.replace(b"\n", b"\tx\n") + good)
    item, _ = score_answers(read_dataset("mine", str(path), rule="exact"), {}, "full").items
    assert item.score == 0
    assert item.error.startswith("broken record")


def test_corrupt_images_fail_when_they_are_opened(tmp_path):
    good = png()
    rows = [
        {"index": 1, "image": good[:100] + "!" + good[101:], "question": "?"},
        {"index": 2, "image": good[: len(good) // 2 // 4 * 4], "question": "?"},
    ]
    for record in records(table(tmp_path / "table.tsv", rows)):
        with pytest.raises(ImageError, match="row"):
            record.value["image"][0].open()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "is empty"),
        (b"index\timage\tquestion\tanswer\n", "has no rows"),
        (b"index\timage\timage\n", "several columns named 'image'"),
        (b"index\timage\tquestion\n1\tx\ty\n", "no column `answer`: answers of test sets"),
        (b"index\tquestion\tanswer\n1\tx\ty\n", "no column `image`"),
        (b"index\timage\tanswer\n1\tx\ty\n", "no column `question`"),
        (b"index\timage\tquestion\tanswer\n1\t\tx\ty\n", "no rows with an image"),
        (b"index\timage\tquestion\tanswer\n1\t%b\tx\t\n" % png().encode(), "1 of 1 rows have no answer"),
        (
            b"index\timage\tquestion\tanswer\n1\t%b\tx\ty\n1\t1\tx\ty\n" % png().encode(),
            "several rows with index '1'",
        ),
        (b'index\timage\tquestion\tanswer\n1\tx\t"?\ty\n2\t1\t?\ty\n', "in line 2 is never closed"),
        (
            b'index\timage\tquestion\tanswer\n1\tx\t"a\nb"\ty\n2\tx\t"?\ty\n3\tx\t"?"\ty\n',
            "in line 4 is closed in line 5, but text follows it",
        ),
    ],
)
def test_unusable_tables_raise(content, error, tmp_path):
    (tmp_path / "table.tsv").write_bytes(content)
    with pytest.raises(DataError, match=error):
        read_dataset("mine", str(tmp_path / "table.tsv"), rule="exact")


def test_rows_left_out_are_counted_and_unusable_rows_are_listed(tmp_path):
    row = {**CHOICE, "split": "validation"}
    rows = [
        {"index": 1, "image": png(), **row},
        {"index": 2, "image": "", **row},
        {"index": 3, "image": "", **row},
        {"index": 4, "image": png(), **row, "split": "dev"},
        {"index": 5, "image": png(), **row, "answer": "E"},
    ]
    path = table(tmp_path / "table.tsv", rows)
    path.write_bytes(path.read_bytes() + b"6\tcut off before its split\n")
    dataset = read_dataset("MMMU_DEV_VAL", str(path))
    assert dataset.left_out == {"without an image": 2, "not of split 'validation'": 1}
    questions, left_out, unusable = dataset.facts()
    assert questions == f"MMMU_DEV_VAL: 3 questions in {dataset.file}"
    assert "3 rows are left out (2 without an image, 1 not of split 'validation')" in left_out
    assert "2 rows are unusable and count as wrong: row 5: no usable answer: " in unusable
    assert "; row 6: broken record: " in unusable


def test_the_error_of_a_missing_table_has_its_address(tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(tmp_path))
    with pytest.raises(ConfigError, match=r"opencompass.*/VLMEval/MMStar\.tsv and put it there, set LMUData"):
        read_dataset("MMStar")
    with pytest.raises(ConfigError, match=r"no .*nowhere\.tsv.*Get it from http.*/MME\.tsv"):
        read_dataset("MME", str(tmp_path / "nowhere.tsv"))
    with pytest.raises(ConfigError, match=r"'MMStarr' is not known.*MMStar.*rule: option"):
        read_dataset("MMStarr")
    with pytest.raises(ConfigError, match="the rules are option, yes_or_no"):
        read_dataset("mine", rule="options")
    table(tmp_path / "MMStar.tsv", [{"index": 1, "image": png(), **CHOICE}])
    assert read_dataset("MMStar").file == str(tmp_path / "MMStar.tsv")


def test_captioning_reads_the_selected_rows_of_a_table(tmp_path):
    rows = [{"index": n, "image": png(n), **CHOICE} for n in range(4)]
    dataset = read_dataset("MMStar", str(table(tmp_path / "table.tsv", rows)))
    keys = tmp_path / "keys.txt"
    keys.write_text("1\n3\n")
    section = InputSection(source=dataset.file, prompt=dataset.template, key="index", keys=str(keys))
    write_manifest(section, tmp_path / "manifest.parquet", 10)
    listed = Manifest(tmp_path / "manifest.parquet").shard(0, 10**6)
    assert [row.key for row in listed] == ["1", "3"]
    assert [row.messages for row in listed] == [dataset.questions[n].messages for n in (1, 3)]
    assert [row.images for row in listed] == [
        tuple(type(i)(i.path, i.name, i.offset, i.size, 10**6) for i in dataset.questions[n].images)
        for n in (1, 3)
    ]


def test_shapes_are_written_as_a_table_too(tmp_path):
    write_shapes(ShapesConfig(output=tmp_path, train=0, validation=0, test=2, tsv=True))
    dataset = read_dataset("Shapes", str(tmp_path / "test.tsv"))
    rows = json.loads((tmp_path / "test.json").read_text())
    assert len(dataset.questions) == len(rows) == 12
    assert len({question.group for question in dataset.questions}) == 2
    for question, row in zip(dataset.questions, rows, strict=True):
        prompt, answer = (turn["value"] for turn in row["conversations"])
        assert question.messages[0].text == prompt.replace("<image>\n", "<image>")
        assert (question.row["answer"], question.category) == (answer, row["task"])
    assert not list(tmp_path.glob("train.tsv"))
