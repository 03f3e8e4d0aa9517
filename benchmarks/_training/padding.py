"""The share of padding in the batches of large data sets, by the order of the rows; no model is run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import skipvision as sv
from benchmarks._training.rows import draw
from pipelines.finetune.batches import LengthGroupedBatches

BATCHES = (4, 8, 16, 32)
_ROWS = 8192
_VISUAL = 576
_OTHERS = 1 / 16
"""Share of the rows without an image, or with several."""


class Row(NamedTuple):
    """Images and text tokens of a row."""

    images: int
    text: int


def shares(config: sv.SkipConfig, seed: int) -> dict[str, dict[str, list[float]]]:
    """Return the share of padding by data, by order of the rows, and at each size of `BATCHES`."""
    generator = random.Random(seed)
    one_image = [Row(1, sum(draw(generator))) for _ in range(_ROWS)]
    texts = [
        Row(0, generator.randint(100, 1500)) if generator.random() < _OTHERS else row for row in one_image
    ]
    several = [
        row._replace(images=generator.randint(2, 4)) if generator.random() < _OTHERS else row for row in texts
    ]
    data = {
        "one image a row": one_image,
        "1 row of 16 without an image": texts,
        "and 1 of 16 with 2 to 4": several,
    }
    return {name: _by_order(rows, config) for name, rows in data.items()}


def _by_order(rows: Sequence[Row], config: sv.SkipConfig) -> dict[str, list[float]]:
    kept = config.counts(_VISUAL).total
    full = np.array([row.images * _VISUAL + row.text for row in rows])
    pruned = np.array([row.images * kept + row.text for row in rows])
    constant = np.zeros(len(rows), dtype=int)
    orders = {
        "full tokens, random": (constant, full),
        "full tokens, by length": (full, full),
        "pruned, random": (constant, pruned),
        "pruned, by length before pruning": (full, pruned),
        "pruned, by length after pruning": (pruned, pruned),
    }
    return {name: [_share(*order, batch) for batch in BATCHES] for name, order in orders.items()}


def _share(sorted_by: np.ndarray, lengths: np.ndarray, batch: int) -> float:
    """Return the share of padding if rows are grouped by one length and padded to another."""
    grouped = LengthGroupedBatches(sorted_by.tolist(), batch, seed=0)
    positions = 0
    for step in range(grouped.per_epoch):
        rows = lengths[grouped.batch(step)]
        positions += int(rows.max()) * len(rows)
    return 1 - int(lengths.sum()) / positions
