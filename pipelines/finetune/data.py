"""The rows of a fine-tuning run with their lengths, and the rows that were rejected."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from transformers import ProcessorMixin

from pipelines.data.images import ImageError
from pipelines.data.rejects import count_rejects, listed_once
from pipelines.data.rows import Reject, TrainingRow
from pipelines.data.training_rows import apply_bad_row_policy, read_training_rows
from pipelines.finetune.answers import Answered, read_answers
from pipelines.finetune.batches import LengthGroupedBatches, row_lengths
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.folder import FinetuneFolder
from pipelines.shared.console import say
from pipelines.shared.files import write_text
from skipvision.errors import DataError

Answer = Callable[[Sequence[TrainingRow]], Answered]
"""Answers rows that have no answer."""


@dataclass(frozen=True)
class FinetuneData:
    """The training and validation rows of a run.

    Attributes:
        rows: training rows.
        lengths: number of tokens of each training row by which rows are grouped.
        validation: validation rows.
        rejected: numbers of rejected rows of both sets, by kind.
        answered: number of training rows with an answer of the full-token model.
        fingerprint: digest of the training rows and of the number of records in their file. It contains the
            names of images, not their contents.
    """

    rows: Sequence[TrainingRow]
    lengths: Sequence[int]
    validation: Sequence[TrainingRow]
    rejected: Mapping[str, int]
    fingerprint: str
    answered: int = 0

    def steps(self, config: FinetuneConfig) -> int:
        """Return the number of optimiser steps of the run."""
        training = config.training
        if training.max_steps is not None:
            return training.max_steps
        batches = LengthGroupedBatches(self.lengths, training.batch_size, config.seed)
        return max(1, math.ceil(training.epochs * batches.per_epoch))


def read_data(
    config: FinetuneConfig,
    folder: FinetuneFolder,
    processor: ProcessorMixin,
    positions: int | None,
    answer: Answer | None = None,
) -> FinetuneData:
    """Return all usable rows; list the others in ``folder.rejects``.

    ``positions`` is the number of positions of the model (None: no limit), and of tokens that a row may have.
    With a teacher, training rows may lack an answer: ``answer`` is called with those, if there are any.

    A run with a checkpoint keeps the rows it began with. If an image has become unreadable since, the step
    that needs it lists the row.

    Raises:
        DataError: no row is usable, or unusable rows stop the run by ``data.on_bad_row``.
    """
    if folder.has_work and folder.rows.exists():
        return _read_again(config, folder)
    data, source = config.data, config.data.validation
    train = _read(config, data.train, processor, positions, answer if config.training.teaches else None)
    if source is None:
        validation = _Measured([], [], [], 0)
    else:
        validation = train if source == data.train else _read(config, source, processor, positions, None)
    left_out = listed_once({"train": train.rejects, "validation": validation.rejects})
    rejected = apply_bad_row_policy(train.rows, left_out, data.on_bad_row, str(folder.rejects))
    # An answer of the full-token model is no truth to compare with.
    labelled = [row for row in validation.rows if row.key not in validation.answered]
    if source is not None and not labelled:
        raise DataError(f"data.validation = {source}: it has no usable row; see {folder.rejects}")
    if rejected:
        say(f"{len(left_out)} rows are skipped and listed in {folder.rejects}: {rejected}")
    fingerprint = _fingerprint(train.rows, train.records)
    return FinetuneData(train.rows, train.lengths, labelled, rejected, fingerprint, len(train.answered))


def keep_choice(data: FinetuneData, folder: FinetuneFolder) -> None:
    """Save the rows that a run begins with, which `read_data` reads when the run is resumed."""
    train = {row.key: length for row, length in zip(data.rows, data.lengths, strict=True)}
    validation = [row.key for row in data.validation]
    choice = {"train": train, "validation": validation, "answered": data.answered}
    write_text(folder.rows, json.dumps(choice))


class _Measured(NamedTuple):
    """Usable rows with their lengths, rejected rows, and the number of records in the file.

    ``answered`` are the keys of the rows that the full-token model has answered.
    """

    rows: list[TrainingRow]
    lengths: list[int]
    rejects: list[Reject]
    records: int
    answered: frozenset[str] = frozenset()


def _read(
    config: FinetuneConfig,
    source: str,
    processor: ProcessorMixin,
    positions: int | None,
    answer: Answer | None,
) -> _Measured:
    """Read rows and reject those that are too long, because a truncated answer teaches nonsense.

    Rows without an answer are rejected, or answered and appended to the others.

    Skip-Vision shortens the sequence that the layers compute, but every token keeps its original position.
    The whole row therefore has to fit into the model's positions, as a request to the endpoint does.
    """
    data = config.data
    # A teacher computes all tokens, which takes longer than what skipping leaves of the student.
    skip = None if config.training.teaches else config.skip
    again = partial(read_training_rows, source, image_root=data.image_root, without_answer=answer is not None)
    read = again(check_images=data.check_images)
    questions = [row for row in read.rows if not row.answered]
    answered = answer(questions) if answer is not None and questions else Answered([], [])
    try:
        rows = [*(row for row in read.rows if row.answered), *answered.rows]
        lengths = row_lengths(processor, rows, skip)
    except ImageError:  # images were not checked, but the processor needs their sizes
        read = again()
        rows = [*(row for row in read.rows if row.answered), *answered.rows]
        lengths = row_lengths(processor, rows, skip)
    listed = {reject.source for reject in read.rejects}
    rejects = [*read.rejects, *(reject for reject in answered.rejects if reject.source not in listed)]
    records = len(read.rows) + len(read.rejects)
    measured = _Measured([], [], rejects, records, frozenset(row.key for row in answered.rows))
    limit, limit_name = data.max_length, f"data.max_length = {data.max_length}"
    if positions is not None and positions < limit:
        limit, limit_name = positions, f"the {positions} positions of the model"
    for row, length in zip(rows, lengths, strict=True):
        if length.tokens <= limit:
            measured.rows.append(row)
            measured.lengths.append(length.computed)
        else:
            reason = f"{length.tokens} tokens, more than {limit_name}"
            measured.rejects.append(Reject(row.source, row.key, "too long", reason))
    return measured


def _read_again(config: FinetuneConfig, folder: FinetuneFolder) -> FinetuneData:
    """Return the rows of the run's first start, without checking that their images still exist."""
    choice = json.loads(folder.rows.read_text())

    def chosen(source: str, keys: Collection[str]) -> tuple[list[TrainingRow], int]:
        read = read_training_rows(
            source,
            image_root=config.data.image_root,
            check_images="none",
            without_answer=config.training.teaches and source == config.data.train,
        )
        questions = [row for row in read.rows if not row.answered and row.key in keys]
        answered = read_answers(config, folder.answers, questions)
        rows = {row.key: row for row in (*read.rows, *answered.rows)}
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
    lengths, rejected = list(choice["train"].values()), count_rejects(folder.rejects)
    fingerprint = _fingerprint(rows, records)
    return FinetuneData(rows, lengths, validation, rejected, fingerprint, choice.get("answered", 0))


def _fingerprint(rows: Iterable[TrainingRow], records: int) -> str:
    digest = hashlib.sha256(str(records).encode())
    for row in rows:
        # Without the folders of images: they differ between Ray jobs, each of which has its own copy.
        images = [posixpath.basename(str(image)) for image in row.images]
        digest.update(repr((row.key, images, row.messages)).encode())
    return digest.hexdigest()
