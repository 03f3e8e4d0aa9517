"""Tables of questions, as the tests of scoring write them."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

from PIL import Image

CHOICE = {"question": "What is it?", "A": "cat", "B": "dog", "answer": "B", "category": "animals"}
PLAIN = {"question": "What is it?"}
VISTA = {**PLAIN, "task": "figure", "choices": "", "answer_option": "", "precision": ""}

PEOPLE = ["red"] * 4 + ["blue"] * 3 + ["green"] * 2 + ["a dog"]


def png(shade: int = 0) -> str:
    file = io.BytesIO()
    Image.effect_noise((20, 20), 10.0 + shade).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
