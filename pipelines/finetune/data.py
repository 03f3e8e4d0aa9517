"""The rows of a fine-tuning run with their lengths, and the rows that were rejected."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import ProcessorMixin

from pipelines.data.images import ImageError
from pipelines.data.rejects import count_rejects, listed_once
from pipelines.data.rows import Reject, TrainingRow
from pipelines.data.training_rows import apply_bad_row_policy, read_training_rows
from pipelines.finetune.batches import LengthGroupedBatches, row_lengths
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.folder import FinetuneFolder
from pipelines.shared.console import say
from pipelines.shared.files import write_text
from skipvision.errors import DataError


@dataclass(frozen=True)
class FinetuneData:
    """The training and validation rows of a run.

    Attributes:
        rows: training rows.
        lengths: number of tokens of each training row.
        validation: validation rows.
        rejected: numbers of rejected rows of both sets, by kind.
        fingerprint: digest of the training rows and of the number of records in their file. It contains the
            names of images, not their contents.
    """

    rows: Sequence[TrainingRow]
    lengths: Sequence[int]
    validation: Sequence[TrainingRow]
    rejected: Mapping[str, int]
    fingerprint: str

    def steps(self, config: FinetuneConfig) -> int:
        """Return the number of optimiser steps of the run."""
        training = config.training
        if training.max_steps is not None:
            return training.max_steps
        batches = LengthGroupedBatches(self.lengths, training.batch_size, config.seed)
        return max(1, math.ceil(training.epochs * batches.per_epoch))


def read_data(
    config: FinetuneConfig, folder: FinetuneFolder, processor: ProcessorMixin, positions: int | None
) -> FinetuneData:
    """Return all usable rows; list the others in ``folder.rejects``.

    ``positions`` is the number of positions of the model (None: no limit), and of tokens that a row may have.

    A run with a checkpoint keeps the rows it began with. If an image has become unreadable since, the step
    that needs it lists the row.

    Raises:
        DataError: no row is usable, or unusable rows stop the run by ``data.on_bad_row``.
    """
    if folder.has_work and folder.rows.exists():
        return _read_again(config, folder)
    data, source = config.data, config.data.validation
    train = _read(config, data.train, processor, positions)
    if source is None:
        validation = _Measured([], [], [], 0)
    else:
        validation = train if source == data.train else _read(config, source, processor, positions)
    left_out = listed_once({"train": train.rejects, "validation": validation.rejects})
    rejected = apply_bad_row_policy(train.rows, left_out, data.on_bad_row, str(folder.rejects))
    if source is not None and not validation.rows:
        raise DataError(f"data.validation = {source}: it has no usable row; see {folder.rejects}")
    if rejected:
        say(f"{len(left_out)} rows are skipped and listed in {folder.rejects}: {rejected}")
    fingerprint = _fingerprint(train.rows, train.records)
    return FinetuneData(train.rows, train.lengths, validation.rows, rejected, fingerprint)


def keep_choice(data: FinetuneData, folder: FinetuneFolder) -> None:
    """Save the rows that a run begins with, which `read_data` reads when the run is resumed."""
    train = {row.key: length for row, length in zip(data.rows, data.lengths, strict=True)}
    choice = {"train": train, "validation": [row.key for row in data.validation]}
    write_text(folder.rows, json.dumps(choice))


class _Measured(NamedTuple):
    """Usable rows with their lengths, rejected rows, and the number of records in the file."""

    rows: list[TrainingRow]
    lengths: list[int]
    rejects: list[Reject]
    records: int


def _read(config: FinetuneConfig, source: str, processor: ProcessorMixin, positions: int | None) -> _Measured:
    """Read rows and reject those that are too long, because a truncated answer teaches nonsense.

    Skip-Vision shortens the sequence that the layers compute, but every token keeps its original position.
    The whole row therefore has to fit into the model's positions, as a request to the endpoint does.
    """
    data = config.data
    read = read_training_rows(source, image_root=data.image_root, check_images=data.check_images)
    try:
        lengths = row_lengths(processor, read.rows)
    except ImageError:  # images were not checked, but the processor needs their sizes
        read = read_training_rows(source, image_root=data.image_root)
        lengths = row_lengths(processor, read.rows)
    measured = _Measured([], [], list(read.rejects), len(read.rows) + len(read.rejects))
    limit, limit_name = data.max_length, f"data.max_length = {data.max_length}"
    if positions is not None and positions < limit:
        limit, limit_name = positions, f"the {positions} positions of the model"
    for row, length in zip(read.rows, lengths, strict=True):
        if length <= limit:
            measured.rows.append(row)
            measured.lengths.append(length)
        else:
            reason = f"{length} tokens, more than {limit_name}"
            measured.rejects.append(Reject(row.source, row.key, "too long", reason))
    return measured


def _read_again(config: FinetuneConfig, folder: FinetuneFolder) -> FinetuneData:
    """Return the rows of the run's first start, without checking that their images still exist."""
    choice = json.loads(folder.rows.read_text())

    def chosen(source: str, keys: Iterable[str]) -> tuple[list[TrainingRow], int]:
        read = read_training_rows(source, image_root=config.data.image_root, check_images="none")
        rows = {row.key: row for row in read.rows}
        try:
            return [rows[key] for key in keys], len(read.rows) + len(read.rejects)
        except KeyError as key:
            raise DataError(
                f"{source} has changed since run {folder.name!r} began: row {key} is gone; restore it, or "
                "choose another name"
            ) from None

    rows, records = chosen(config.data.train, choice["train"])
    validation: list[TrainingRow] = []
    if config.data.validation is not None:
        validation, _ = chosen(config.data.validation, choice["validation"])
    lengths = list(choice["train"].values())
    return FinetuneData(rows, lengths, validation, count_rejects(folder.rejects), _fingerprint(rows, records))


def _fingerprint(rows: Iterable[TrainingRow], records: int) -> str:
    digest = hashlib.sha256(str(records).encode())
    for row in rows:
        # Without the folders of images: they differ between Ray jobs, each of which has its own copy.
        images = [posixpath.basename(str(image)) for image in row.images]
        digest.update(repr((row.key, images, row.messages)).encode())
    return digest.hexdigest()
