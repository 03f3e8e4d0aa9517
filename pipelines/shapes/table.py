"""Write shapes questions as a table in VLMEvalKit's format."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.data.rows import IMAGE_PLACEHOLDER
from pipelines.shared.files import atomic

_COLUMNS = ("index", "image", "image_path", "question", "answer", "category")


def write_table(folder: Path, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write LLaVA JSON rows of one question each; ``folder`` holds their images, and indices count from 0.

    The first row about an image embeds it. Later rows hold the index of that row instead.
    """
    first: dict[str, int] = {}
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(_COLUMNS)
        for index, row in enumerate(rows):
            holder = first.setdefault(row["image"], index)
            image = (
                base64.b64encode((folder / row["image"]).read_bytes()).decode() if holder == index else holder
            )
            question, answer = (turn["value"] for turn in row["conversations"])
            text = question.removeprefix(f"{IMAGE_PLACEHOLDER}\n")
            table.writerow((index, image, row["image"], text, answer, row["task"]))
