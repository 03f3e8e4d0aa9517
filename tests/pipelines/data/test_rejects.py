"""Rows whose images become unreadable during a run are listed once, by any worker, and counted."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from transformers import AutoProcessor

from pipelines.data.images import ImageError, MissingImageError
from pipelines.data.rejects import LateRejects, count_rejects
from pipelines.data.rows import TrainingRow
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.data import keep_choice, read_data
from pipelines.finetune.folder import FinetuneFolder
from skipvision.errors import DataError

ROWS = [TrainingRow(f"row-{number}", (), (), source=f"t.json: row {number}") for number in range(40)]


def listed(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_row_is_listed_once(tmp_path, capsys):
    file = tmp_path / "rejects.jsonl"
    file.write_text('{"source": "a: row 1", "key": "old", "kind": "too long", "reason": "é"}\n')
    leave_out = LateRejects(file, ("train",), stop=False)
    for _ in range(3):
        leave_out(ROWS[0], MissingImageError("image a.png does not exist"))
        leave_out(ROWS[1], ImageError("image b.png is empty"))
        LateRejects(file, ("train",), stop=False)(ROWS[0], ImageError("after a restart"))
    namesake = replace(ROWS[0], source="validation.json: row 0")
    LateRejects(file, ("validation",), stop=False)(namesake, ImageError("another row of that name"))
    assert listed(file)[1:] == [
        {
            "source": "t.json: row 0",
            "key": "row-0",
            "kind": "missing image",
            "reason": "image a.png does not exist",
            "data_sets": ["train"],
        },
        {
            "source": "t.json: row 1",
            "key": "row-1",
            "kind": "unreadable image",
            "reason": "image b.png is empty",
            "data_sets": ["train"],
        },
        {
            "source": "validation.json: row 0",
            "key": "row-0",
            "kind": "unreadable image",
            "reason": "another row of that name",
            "data_sets": ["validation"],
        },
    ]
    assert count_rejects(file) == {"unreadable image": 2, "too long": 1, "missing image": 1}
    assert capsys.readouterr().out.splitlines() == [
        "left out: t.json: row 0 (row-0): image a.png does not exist",
        "left out: t.json: row 1 (row-1): image b.png is empty",
        "left out: validation.json: row 0 (row-0): another row of that name",
    ]


def test_stop_raises_an_error_with_advice_and_lists_the_row(tmp_path):
    file = tmp_path / "rejects.jsonl"
    with pytest.raises(
        DataError,
        match=r"t.json: row 0 \(row-0\) became unusable during the run: gone. Fix it, or set data.on_bad",
    ):
        LateRejects(file, ("train",), stop=True)(ROWS[0], MissingImageError("gone"))
    assert [reject["key"] for reject in listed(file)] == ["row-0"]


def _meet_all(file: Path, start: int) -> None:
    leave_out = LateRejects(file, ("train",), stop=False)
    for row in [*ROWS[start:], *ROWS[:start]]:
        leave_out(row, ImageError("x" * 5000))


def test_workers_share_the_file(tmp_path):
    """A process that waits for the lock reads the lines written meanwhile."""
    file = tmp_path / "rejects.jsonl"
    other = get_context("fork").Process(target=_meet_all, args=(file, 0))
    with file.open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        other.start()
        other.join(0.5)
        assert other.is_alive()
        line = {"source": "t.json: row 7", "key": "row-7", "kind": "missing image", "reason": ""}
        ours.write(json.dumps(line) + "\n")
        ours.flush()
        fcntl.flock(ours, fcntl.LOCK_UN)  # the other process has this file open too
    other.join(60)
    assert other.exitcode == 0
    assert sorted(reject["key"] for reject in listed(file)) == sorted(row.key for row in ROWS)


def test_a_missing_file_has_no_counts(tmp_path):
    assert count_rejects(tmp_path / "rejects.jsonl") == {}


# ------------------------------------------------------------------------------- a run that is resumed


@pytest.fixture
def config(tiny_model: Path, shapes_data: Path, tmp_path: Path) -> FinetuneConfig:
    shutil.copytree(shapes_data, tmp_path / "data")
    rows = json.loads((tmp_path / "data" / "train.json").read_text())
    rows[2]["image"] = "images/gone.png"
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    return FinetuneConfig.model_validate(
        {
            "name": "run",
            "model": {"path": str(tiny_model)},
            "data": {
                "train": str(tmp_path / "data" / "train.json"),
                "validation": str(tmp_path / "data" / "validation.json"),
            },
        }
    )


def begun(config: FinetuneConfig, tmp_path: Path):
    """The folder of a run with a checkpoint, and its data."""
    folder = FinetuneFolder(tmp_path, "run")
    folder.path.mkdir()
    processor = AutoProcessor.from_pretrained(config.model.path)
    data = read_data(config, folder, processor, None)
    keep_choice(data, folder)
    (folder.checkpoints / "checkpoint_00000001").mkdir(parents=True)
    return folder, data, processor


def test_a_resumed_run_keeps_its_rows_although_their_images_changed(config, tmp_path):
    folder, data, processor = begun(config, tmp_path)
    Path(str(data.rows[0].images[0])).unlink()
    Path(str(data.validation[0].images[0])).write_bytes(b"")
    LateRejects(folder.rejects, ("train",), stop=False)(data.rows[0], MissingImageError("gone"))
    before = folder.rejects.read_text()
    again = read_data(config, folder, processor, None)
    assert (again.rows, again.lengths, again.validation) == (data.rows, data.lengths, data.validation)
    assert again.fingerprint == data.fingerprint
    assert (data.rejected, again.rejected) == ({"missing image": 1}, {"missing image": 2})
    assert folder.rejects.read_text() == before


@pytest.mark.parametrize("change", ["one less", "one more", "another answer"])
def test_a_changed_data_set_is_detected(config, tmp_path, change):
    folder, data, processor = begun(config, tmp_path)
    file = Path(config.data.train)
    rows = json.loads(file.read_text())
    if change == "one less":
        del rows[7]
    elif change == "one more":
        rows.append({**rows[0], "id": "new"})
    else:
        rows[7]["conversations"][1]["value"] = "other"
    file.write_text(json.dumps(rows))
    if change == "one less":
        with pytest.raises(
            DataError, match=r"train.json has changed since run 'run' began: row 'train-000007' is"
        ):
            read_data(config, folder, processor, None)
    else:
        assert read_data(config, folder, processor, None).fingerprint != data.fingerprint


def test_images_whose_size_cannot_be_read_are_rejected(config, tmp_path, monkeypatch):
    """Processors that cut large images into tiles need their sizes, even if images are not to be checked."""
    processor = AutoProcessor.from_pretrained(config.model.path)
    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", None)
    unchecked = config.model_copy(update={"data": config.data.model_copy(update={"check_images": "none"})})
    folder = FinetuneFolder(tmp_path, "run")
    folder.path.mkdir()
    data = read_data(unchecked, folder, processor, None)
    assert (len(data.rows), data.rejected) == (39, {"missing image": 1})
