"""The prompts of a search: the first questions of rows drawn from a user's file."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

from pipelines.calibrate.config import PromptsSection
from pipelines.data.rows import IMAGE_PLACEHOLDER, TrainingRow
from pipelines.data.training_rows import read_training_rows
from pipelines.evaluation.exact_match import group_of
from skipvision.errors import DataError


@dataclass(frozen=True)
class Prompts:
    """Rows of one question each, without an answer.

    Attributes:
        search: the rows that decide.
        held_out: the rows that verify, with other images.
        facts: lines about the file.
    """

    search: tuple[TrainingRow, ...]
    held_out: tuple[TrainingRow, ...]
    facts: tuple[str, ...]

    @property
    def rows(self) -> tuple[TrainingRow, ...]:
        """The rows of both parts, those of the search first."""
        return (*self.search, *self.held_out)


def read_prompts(section: PromptsSection, seed: int) -> Prompts:
    """Draw rows with images, at most one per image, and split them.

    Raises:
        DataError: the file cannot be read, or has fewer than two images.
    """
    read = read_training_rows(section.path, image_root=section.image_root, without_answer=True)
    rows = [row for row in read.rows if row.images and _shows_all_first(row)]
    random.Random(seed).shuffle(rows)
    drawn: dict[str, TrainingRow] = {}
    for row in rows:
        if len(drawn) == section.rows:
            break
        drawn.setdefault(group_of(row), _prompt(row))
    later = sum(bool(row.images) for row in read.rows) - len(rows)
    if len(drawn) < 2:
        problem = f"; {read.rejects[0].source}: {read.rejects[0].reason}" if read.rejects else ""
        raise DataError(
            f"prompts.path = {section.path}: {len(drawn)} usable rows with different images; at least 2 are "
            f"needed, to hold some out{problem}"
        )
    chosen = list(drawn.values())
    held_out = min(max(1, round(section.held_out * len(chosen))), len(chosen) - 1)
    facts = [f"{len(chosen)} rows of {len(read.rows)} in {section.path}, {held_out} of them held out"]
    if len(chosen) < section.rows:
        facts.append(f"prompts.rows = {section.rows}, but the file has {len(chosen)} different images")
    if later:
        facts.append(f"{later} rows are left out, because a later question has an image")
    if read.rejects:
        kinds = Counter(reject.kind for reject in read.rejects)
        listed = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
        first = read.rejects[0]
        facts.append(
            f"{len(read.rejects)} rows are left out ({listed}); the first: {first.source}: {first.reason}"
        )
    return Prompts(tuple(chosen[held_out:]), tuple(chosen[:held_out]), tuple(facts))


def _prompt(row: TrainingRow) -> TrainingRow:
    first = next(number for number, message in enumerate(row.messages) if message.role == "user")
    return replace(row, messages=row.messages[: first + 1])


def _shows_all_first(row: TrainingRow) -> bool:
    """Whether all images of a row belong to its first question; others would lose some."""
    return sum(m.text.count(IMAGE_PLACEHOLDER) for m in _prompt(row).messages) == len(row.images)
