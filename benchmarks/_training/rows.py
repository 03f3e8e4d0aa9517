"""The data of the comparison: rows like LLaVA's instructions, their images and their processor."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks._engines.workload import IMAGE, write_images, write_processor
from benchmarks._measure import Geometry
from pipelines.data.images import FileImage
from pipelines.data.rows import Message, TrainingRow
from pipelines.engines.loading import load_processor

QUESTION = (8, 40)
"""Tokens of a question: fewest and most."""
ANSWERS = {"a word or a phrase": (0.60, 1, 6), "a sentence": (0.25, 10, 40), "a paragraph": (0.15, 80, 250)}
"""Share of the rows with such an answer, and its tokens: fewest and most."""
POOL = 64
"""Batches among which the recipe groups rows by length. The rows of a run are taken from that many."""
_IMAGES = 16
_END = "~"
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% if message['role'] == 'assistant' %}" + _END + "{% endif %}{% endfor %}"
)


class Length(NamedTuple):
    """Text tokens of a row, without the token that ends the answer."""

    question: int
    answer: int


def draw(generator: random.Random) -> Length:
    """Draw the lengths of a row's question and answer."""
    shares = [share for share, _, _ in ANSWERS.values()]
    ((_, low, high),) = generator.choices(list(ANSWERS.values()), shares)
    return Length(generator.randint(*QUESTION), generator.randint(low, high))


def sample(batch: int, batches: int, seed: int) -> list[Length]:
    """Draw the rows of a run: ``batches`` whole batches of a large data set grouped by length.

    They have equal distances in the order of lengths. So batches are as uneven as in a data set of `POOL`
    batches. With six or more of them, the run has long rows and short ones in the right proportion.
    """
    generator = random.Random(seed)
    pool = sorted((draw(generator) for _ in range(POOL * batch)), key=sum, reverse=True)
    starts = [batch * ((2 * number + 1) * POOL // (2 * batches)) for number in range(batches)]
    return [length for start in starts for length in pool[start : start + batch]]


def write_data(folder: Path, geometry: Geometry) -> None:
    """Write a processor that ends answers, and images of random pixels."""
    write_processor(folder, geometry)
    processor = load_processor(str(folder))
    processor.tokenizer.eos_token = _END  # a token of its vocabulary that no text here has
    processor.chat_template = _TEMPLATE
    processor.save_pretrained(folder)
    write_images(folder, geometry, _IMAGES)


def training_rows(folder: Path, lengths: Sequence[Length]) -> list[TrainingRow]:
    """Return rows with one image and random words each."""
    return [_row(folder, number, length) for number, length in enumerate(lengths)]


def _row(folder: Path, number: int, length: Length) -> TrainingRow:
    words = random.Random(number)
    question, answer = ("".join(words.choices(string.ascii_uppercase, k=tokens)) for tokens in length)
    image = FileImage(str(folder / "images" / f"{number % _IMAGES:03}.png"))
    return TrainingRow(
        str(number), (image,), (Message("user", f"{IMAGE}\n{question}"), Message("assistant", answer))
    )
