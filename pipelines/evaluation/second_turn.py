"""Second turns: the questions of rows, each as a follow-up to another question about the same image.

How visual tokens are pruned is decided when the image is first read. A follow-up question reveals whether
what stayed serves only the first question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipelines.data.rows import IMAGE_PLACEHOLDER, Message, TrainingRow
from pipelines.evaluation.exact_match import group_of

CAPTION = "caption"
"""The task whose answer contains all others: it is never the first turn."""


def second_turns(rows: Sequence[TrainingRow], answers: Mapping[str, str]) -> list[TrainingRow]:
    """Return rows that put each row's question after another question about the same image.

    The first question is that of the row before it among the rows of its image; before the first row comes
    the last. Rows without such a partner, and rows of several turns, are left out.

    Args:
        rows: with their expected answers.
        answers: what the model answered, by key of the row: the answer of the first turn.
    """
    by_image: dict[str, list[TrainingRow]] = defaultdict(list)
    for row in rows:
        if row.images and [message.role for message in row.messages] == ["user", "assistant"]:
            by_image[group_of(row)].append(row)
    return [_after(first, row, answers) for first, row in _pairs(by_image) if first.key in answers]


def _pairs(by_image: Mapping[str, Sequence[TrainingRow]]) -> list[tuple[TrainingRow, TrainingRow]]:
    """Return (first, second) of each row that has a partner."""
    pairs = []
    for rows in by_image.values():
        for position, row in enumerate(rows):
            before = [*rows[position + 1 :], *rows[:position]]
            partners = [other for other in before if other.task != CAPTION and other.images == row.images]
            if partners:
                pairs.append((partners[-1], row))
    return pairs


def _after(first: TrainingRow, second: TrainingRow, answers: Mapping[str, str]) -> TrainingRow:
    question = second.messages[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
    turns = (first.messages[0], Message("assistant", answers[first.key]), Message("user", question))
    return replace(second, messages=(*turns, second.messages[-1]))
