"""The rows of a fine-tuning run, measured, and what became of the others."""

from __future__ import annotations

import hashlib
import math
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.batches import LengthGroupedBatches, row_lengths
from pipelines.datasets import TrainingData, apply_bad_row_policy, read_training_rows
from pipelines.finetune_config import FinetuneConfig
from pipelines.learner import load_processor
from pipelines.rows import Reject, TrainingRow
from skipvision.errors import DataError


@dataclass(frozen=True)
class FinetuneData:
    """What a run trains and is validated on.

    ``lengths`` are the tokens of each row; ``rejected`` counts rows left out of both sets by kind;
    ``fingerprint`` tells these training rows from others, images by name.
    """

    rows: Sequence[TrainingRow]
    lengths: Sequence[int]
    validation: Sequence[TrainingRow]
    rejected: Mapping[str, int]
    fingerprint: str

    def steps(self, config: FinetuneConfig) -> int:
        """Optimiser steps of the run."""
        training = config.training
        if training.max_steps is not None:
            return training.max_steps
        batches = LengthGroupedBatches(self.lengths, training.batch_size, config.seed)
        return max(1, math.ceil(training.epochs * batches.per_epoch))


def read_data(config: FinetuneConfig, rejects: Path) -> FinetuneData:
    """All usable rows; the others are listed in ``rejects``, which may be a `DataError`."""
    data = config.data
    rows, lengths, left_out = _read(config, data.train)
    validation: Sequence[TrainingRow] = []
    if data.validation is not None:
        validation, _, more = _read(config, data.validation)
        left_out = [*left_out, *more]
    rejected = apply_bad_row_policy(rows, left_out, data.on_bad_row, str(rejects))
    if data.validation is not None and not validation:
        raise DataError(f"data.validation = {data.validation}: it has no row that can be used; see {rejects}")
    if rejected:
        print(f"{len(left_out)} rows are left out, listed in {rejects}: {rejected}", flush=True)
    return FinetuneData(rows, lengths, validation, rejected, _fingerprint(rows))


def _read(config: FinetuneConfig, source: str) -> tuple[list[TrainingRow], list[int], list[Reject]]:
    """Rows that fit into ``max_length`` with their lengths, and the others: a cut answer teaches nonsense."""
    data = config.data
    read: TrainingData = read_training_rows(
        source, image_root=data.image_root, check_images=data.check_images
    )
    rows, lengths, rejects = [], [], list(read.rejects)
    measured = row_lengths(load_processor(config.model.path), read.rows)
    for row, length in zip(read.rows, measured, strict=True):
        if length <= data.max_length:
            rows.append(row)
            lengths.append(length)
        else:
            reason = f"{length} tokens, more than data.max_length = {data.max_length}"
            rejects.append(Reject(source, row.key, "too long", reason))
    return rows, lengths, rejects


def _fingerprint(rows: Sequence[TrainingRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        # Not the images' folders: a Ray job finds them in another copy of the project each time.
        images = [posixpath.basename(str(image)) for image in row.images]
        digest.update(repr((row.key, images, row.messages)).encode())
    return digest.hexdigest()
