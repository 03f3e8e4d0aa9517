"""Exact match: which answers are right, and that batching does not change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import skipvision as sv
from pipelines.data.images import FileImage, InlineImage, MissingImageError, ParquetImage
from pipelines.data.rows import Message, TrainingRow
from pipelines.data.training_rows import read_training_rows
from pipelines.evaluation.exact_match import Answer, accuracy_by_task, evaluate_exact_match, exact_items


def test_only_case_and_white_space_are_ignored():
    assert Answer("k", "t", "Top  left", " top\nLEFT ").correct
    assert not Answer("k", "t", "red", "red.").correct
    assert not Answer("k", "t", "red", "a red").correct


def test_accuracy_is_counted_per_task_and_overall():
    answers = [
        Answer("1", "shape", "star", "star"),
        Answer("2", "colour", "red", "blue"),
        Answer("3", "colour", "red", "red"),
        Answer("4", "", "x", "x"),
    ]
    assert accuracy_by_task(answers) == {"colour": 0.5, "shape": 1.0, "overall": 0.75}
    assert accuracy_by_task([]) == {}


@pytest.mark.parametrize("kind", ["file", "copied file", "in the row", "parquet cell"])
def test_questions_about_one_image_form_a_group(tmp_path, kind):
    """Wherever the image is. Rows without images are groups of their own."""
    contents = [b"one image", b"one image", b"another"]
    images = []
    for number, content in enumerate(contents):
        path = tmp_path / (f"{number}.png" if kind == "copied file" else f"{len(content)}.png")
        path.write_bytes(content)
        images.append(
            InlineImage(content, f"#1 of row {number}") if kind == "in the row" else FileImage(str(path))
        )
    if kind == "parquet cell":
        pq.write_table(pa.table({"image": contents}), tmp_path / "rows.parquet")
        images = [ParquetImage(str(tmp_path / "rows.parquet"), 0, number, "image", 0) for number in range(3)]
    said = (Message("user", "What?"), Message("assistant", "red"))
    rows = [TrainingRow(f"row {number}", (image,), said) for number, image in enumerate(images)]
    rows += [TrainingRow("text", (), said), TrainingRow("more text", (), said)]
    answers = [Answer(row.key, row.task, "red", "red") for row in rows]
    groups = [item.group for item in exact_items(rows, answers, "full")]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 4


@pytest.mark.parametrize("skip", [None, sv.SkipConfig(retained=4, skipped=4)], ids=["full", "skipping"])
def test_a_batch_gives_the_answers_of_its_rows_alone(tiny_model: Path, shapes_data: Path, skip):
    model = AutoModelForImageTextToText.from_pretrained(tiny_model, dtype=torch.float64)
    model.train()
    processor = AutoProcessor.from_pretrained(tiny_model)
    rows, _ = read_training_rows(str(shapes_data / "validation.json"))
    question = TrainingRow("text", (), (Message("user", "How many?"), Message("assistant", "none")))
    earlier = TrainingRow(
        "turns", rows[0].images, (*rows[0].messages, Message("user", "And?"), Message("assistant", "no"))
    )
    rows = [*rows, question, earlier]
    attachment = sv.attach(model, skip) if skip else None
    together = evaluate_exact_match(model, processor, rows, batch_size=8, max_new_tokens=6)
    assert model.training
    if attachment is not None:
        assert attachment.plan is not None
    alone = [evaluate_exact_match(model, processor, [row], max_new_tokens=6)[0] for row in rows]
    # The length of a wrong answer depends on its batch; its beginning does not.
    for one, other in zip(together, alone, strict=True):
        assert (one.key, one.task, one.expected) == (other.key, other.task, other.expected)
        shorter, longer = sorted([one.answer, other.answer], key=len)
        assert longer.startswith(shorter)


def test_a_row_with_a_missing_image_is_reported_and_skipped(tiny_model: Path, shapes_data: Path):
    """The row shares its batch with others or has one of its own."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    rows = read_training_rows(str(shapes_data / "validation.json")).rows[:3]
    rows[1] = replace(rows[1], images=(FileImage(str(shapes_data / "gone.png")),))
    with pytest.raises(MissingImageError, match=r"gone\.png"):
        evaluate_exact_match(model, processor, rows, max_new_tokens=2)
    for batch_size in (1, 3):
        unreadable: list[str] = []
        answers = evaluate_exact_match(
            model,
            processor,
            rows,
            batch_size=batch_size,
            max_new_tokens=2,
            on_unreadable=lambda row, error: unreadable.append(f"{row.key}: {error.kind}"),  # noqa: B023
        )
        assert [answer.key for answer in answers] == [rows[0].key, rows[2].key]
        assert unreadable == [f"{rows[1].key}: missing image"]


def test_answers_are_compared_with_the_last_message(tiny_model: Path, shapes_data: Path, monkeypatch):
    """A model that returns the expected answers is right, in whatever order they were batched."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    processor = AutoProcessor.from_pretrained(tiny_model)
    rows, _ = read_training_rows(str(shapes_data / "validation.json"))
    expected = {row.messages[0].text.split("\n")[-1]: row.messages[-1].text for row in rows}

    def generate(**inputs):
        prompts = processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        texts = [next(expected[q] for q in expected if q in prompt) for prompt in prompts]
        answers = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        return torch.cat([inputs["input_ids"], answers["input_ids"]], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    answers = evaluate_exact_match(model, processor, rows, batch_size=5)
    assert [answer.key for answer in answers] == [row.key for row in rows]
    right = [answer.correct for answer in answers if answer.task == "colour"]
    assert right == [True] * len(right) != []
