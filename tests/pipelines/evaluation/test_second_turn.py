"""Second turns: which question precedes which, and the conversation that results."""

from __future__ import annotations

from pathlib import Path

from pipelines.data.images import FileImage
from pipelines.data.rows import Message, TrainingRow
from pipelines.data.training_rows import read_rows
from pipelines.evaluation.second_turn import second_turns


def test_each_question_follows_another_about_its_image_and_the_own_answer(shapes_data: Path) -> None:
    rows = read_rows(str(shapes_data / "test.json"))
    assert [row.task for row in rows] == ["caption", "colour", "shape", "count", "place", "number"]
    answers = {row.key: f"answer to {row.task}" for row in rows}
    turns = second_turns(rows, answers)
    assert [turn.key for turn in turns] == [row.key for row in rows]
    first = {turn.task: turn.messages[1].text.removeprefix("answer to ") for turn in turns}
    assert first == {
        "caption": "number",
        "colour": "number",  # a caption would contain the answer
        "shape": "colour",
        "count": "shape",
        "place": "count",
        "number": "place",
    }
    by_task = {row.task: row for row in rows}
    shape = next(turn for turn in turns if turn.task == "shape")
    assert shape.messages[0] == by_task["colour"].messages[0]
    question = by_task["shape"].messages[0].text.removeprefix("<image>\n")
    assert shape.messages[2:] == (Message("user", question), by_task["shape"].messages[1])
    assert shape.images == by_task["shape"].images


def test_rows_without_a_partner_are_left_out() -> None:
    def row(key: str, image: str, task: str, *more: Message) -> TrainingRow:
        turns = (Message("user", "<image>\n?"), Message("assistant", "yes"), *more)
        return TrainingRow(key, (FileImage(image),), turns, task)

    longer = (Message("user", "And?"), Message("assistant", "no"))
    rows = [
        row("alone", "a.png", "x"),
        row("caption", "b.png", "caption"),
        row("only other", "b.png", "x"),
        row("longer", "a.png", "x", *longer),
        TrainingRow("text", (), rows_text := (Message("user", "?"), Message("assistant", "yes")), "x"),
        TrainingRow("text too", (), rows_text, "x"),
    ]
    turns = second_turns(rows, {one.key: "?" for one in rows})
    assert [turn.key for turn in turns] == ["caption"], "a caption is never first"
    assert second_turns(rows, {}) == []
