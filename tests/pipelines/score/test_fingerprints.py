"""Fingerprints depend on contents, not on paths."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from pipelines.evaluation.fingerprints import of_folder, of_model
from pipelines.score.dataset import read_dataset
from pipelines.score.fingerprints import of_dataset
from tests.pipelines.score.tables import png, table

ROWS: list[dict[str, Any]] = [
    {"index": 1, "image": png(1), "question": "What?", "answer": "a cat", "category": "animals"},
    {"index": 2, "image": png(2), "question": "Where?", "answer": "a tree", "category": "plants"},
    {"index": 3, "image": 2, "question": "And here?", "answer": "a bush", "category": "plants"},
]


def fingerprint(folder: Path, rows: list[dict[str, Any]] = ROWS, **settings: Any) -> str:
    folder.mkdir(exist_ok=True)
    return of_dataset(
        read_dataset("mine", str(table(folder / "t.tsv", rows)), **{"rule": "exact", **settings})
    )


@pytest.mark.parametrize(
    ("changed", "settings"),
    [
        *(({name: "other"}, {}) for name in ("question", "answer", "category")),
        ({"image": png(7)}, {}),
        ({"image": 2}, {}),
        ({}, {"rule": "contains"}),
        ({}, {"instruction": "In one word."}),
        ({}, {"limit": 2}),
    ],
)
def test_the_fingerprint_of_a_dataset_depends_on_its_questions_and_rule(tmp_path, changed, settings):
    before = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "elsewhere", ROWS[::-1]) == before
    assert fingerprint(tmp_path / "b", [{**ROWS[0], **changed}, *ROWS[1:]], **settings) != before


def test_the_fingerprint_of_a_dataset_depends_on_its_image_files(tmp_path):
    rows = [{"index": 1, "image_path": "one.png", "question": "What?", "answer": "a cat"}]
    digests = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "one.png")
        digests.append(fingerprint(tmp_path, rows))
    (tmp_path / "one.png").unlink()
    digests.append(fingerprint(tmp_path, rows))
    assert len(set(digests)) == 3


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.png", "memory://fingerprints/a.png"])
def test_an_image_at_a_url_counts_by_its_address_whether_or_not_it_can_be_read(tmp_path, address):
    rows = [{"index": 1, "image_path": address, "question": "What?", "answer": "a cat"}]
    away = fingerprint(tmp_path, rows)
    file_system = fsspec.filesystem("memory")
    file_system.pipe("/fingerprints/a.png", b"an image")
    assert fingerprint(tmp_path, rows) == away
    file_system.rm("/fingerprints", recursive=True)
    assert fingerprint(tmp_path, [{**rows[0], "image_path": f"{address}2"}]) != away


def test_the_fingerprint_of_a_model_depends_on_the_files_that_loading_reads(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    (folder / "README.md").write_text("A model.")
    assert of_model(str(folder)) == of_folder(folder) == of_folder(tiny_model)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert of_folder(folder) != of_folder(tiny_model)
