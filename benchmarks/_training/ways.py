"""The ways to train: transformers' `Trainer`, TRL's `SFTTrainer`, and this project's recipe."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks import _measure
from benchmarks._measure import FULL, Geometry
from benchmarks._training.rows import Length, training_rows
from pipelines.data.collate import Batch, Collator
from pipelines.data.rows import TrainingRow
from pipelines.engines.loading import load_processor
from pipelines.finetune.batches import LengthGroupedBatches, prefetched, row_lengths
from pipelines.finetune.config import FinetuneConfig
from pipelines.finetune.learner import Learner, prepare

TRAINER, SFT, SFT_CHECKPOINTS = "Trainer", "SFTTrainer", "SFTTrainer-defaults"
STOCK = (TRAINER, SFT, SFT_CHECKPOINTS)
"""Ways that are not this project's; the others are ``full`` and RETAINED+SKIPPED."""

Options = dict[str, Any]


@dataclass
class Stopwatch:
    """Wall seconds and CPU seconds of all threads between two calls."""

    seconds: float = 0.0
    cpu: float = 0.0
    _begin: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._begin = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._begin[0]
        self.cpu = time.process_time() - self._begin[1]


@dataclass
class Setup:
    """The model and the rows of a process, and the positions that its batches have.

    Attributes:
        options: of the process; see `benchmarks.training.worker_options`.
        model: with LoRA, and Skip-Vision attached if the way prunes.
        rows: the same in all processes.
        collator: makes batches and their labels, also those of `Trainer`.
        positions: positions of the caller's batches, padding included, since the last reset.
    """

    options: Options
    config: FinetuneConfig
    model: nn.Module
    rows: list[TrainingRow]
    collator: Collator
    positions: int = 0
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Options) -> Setup:
        """Build the model with random weights, and prepare it as a fine-tuning job does."""
        folder = Path(options["folder"])
        skip = None if options["way"] in (*STOCK, FULL) else _measure.setting(options["way"])
        config = FinetuneConfig.model_validate(
            {
                "name": "benchmark",
                "model": {"path": str(folder), "attention": options["attention"]},
                "data": {"train": "rows.json"},
                "lora": {"rank": options["rank"], "alpha": 2 * options["rank"]},
                "skip": skip,
                "training": {"batch_size": options["batch"], "precision": options["dtype"]},
            }
        )
        base: Any = _measure.build(
            Geometry(**options["geometry"]), torch.device("cpu"), getattr(torch, options["dtype"])
        )
        base.set_attn_implementation(options["attention"])
        lengths = [Length(*length) for length in options["lengths"]]
        collator = Collator(load_processor(str(folder)))
        return cls(options, config, prepare(base, config), training_rows(folder, lengths), collator)

    def collate(self, rows: Sequence[TrainingRow]) -> Batch:
        """Make a batch and count its positions."""
        batch = self.collator(rows)
        self.positions += batch.labels.numel()
        return batch


def epoch_of(way: str) -> Callable[[Setup, int], Stopwatch]:
    """Return the function that trains on all rows once; its second argument is the number of the round."""
    return _trainer if way == TRAINER else _sft if way in STOCK else _recipe


# ----------------------------------------------------------------------------------- this project


def _recipe(setup: Setup, turn: int) -> Stopwatch:
    """Train as a worker of `jobs/finetune.py` does, without Ray, MLflow and checkpoints."""
    if "learner" not in setup.kept:
        setup.kept["learner"] = Learner(setup.model, setup.config, torch.device("cpu"))
        lengths = row_lengths(setup.collator.format.processor, setup.rows, setup.config.skip)
        setup.kept["lengths"] = [length.computed for length in lengths]
    learner: Learner = setup.kept["learner"]
    order = LengthGroupedBatches(setup.kept["lengths"], setup.options["batch"], seed=turn)
    steps, watch = order.per_epoch, Stopwatch()

    def batches(step: int) -> list[Batch]:
        return [setup.collate([setup.rows[number] for number in order.batch(step)])]

    watch.start()
    for step, batch in enumerate(prefetched(batches, range(steps), setup.config.training.prefetch)):
        learner.step(batch, step, steps)
    watch.stop()
    return watch


# ----------------------------------------------------------------------------------- stock recipes


class _Watched(TrainerCallback):
    """Measures from the first batch to the last step, without the construction of a trainer."""

    def __init__(self) -> None:
        self.watch = Stopwatch()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.watch.stop()


def _trainer(setup: Setup, turn: int) -> Stopwatch:
    """Train with `Trainer`: random order, padding, and the loss that the model computes from all logits."""

    def collate(rows: Sequence[TrainingRow]) -> dict[str, torch.Tensor]:
        batch = setup.collate(rows)
        return {**batch.inputs, "labels": batch.labels}

    watched = _Watched()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, remove_unused_columns=False, **_common(setup, turn))
        trainer = Trainer(
            setup.model, arguments, data_collator=collate, train_dataset=setup.rows, callbacks=[watched]
        )
        trainer.train()
    return watched.watch


def _sft(setup: Setup, turn: int) -> Stopwatch:
    """Train with `SFTTrainer` on prompts and completions, by its own collator for images."""
    import trl

    if "dataset" not in setup.kept:
        setup.kept["dataset"] = _dataset(setup.rows)
    watched = _Watched()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            folder,
            max_length=None,
            gradient_checkpointing=setup.options["way"] == SFT_CHECKPOINTS,
            **_common(setup, turn),
        )
        trainer = trl.SFTTrainer(
            setup.model,
            arguments,
            train_dataset=setup.kept["dataset"],
            processing_class=setup.collator.format.processor,
            callbacks=[watched],
        )
        collate = trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> Any:
            batch = collate(examples)
            setup.positions += batch["labels"].numel()
            return batch

        trainer.data_collator = counted
        trainer.train()
    return watched.watch


def _common(setup: Setup, turn: int) -> Options:
    """Return what both trainers are set to; all else are their defaults."""
    return {
        "per_device_train_batch_size": setup.options["batch"],
        "num_train_epochs": 1,
        "learning_rate": setup.config.training.learning_rate,
        "bf16": setup.options["dtype"] == "bfloat16",
        "use_cpu": True,
        "seed": turn,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def _dataset(rows: Sequence[TrainingRow]) -> Any:
    """Return rows in TRL's format of images, prompts and completions."""
    import datasets

    def message(row: TrainingRow, number: int) -> list[dict[str, str]]:
        text = row.messages[number].text.removeprefix("<image>\n")
        return [{"role": row.messages[number].role, "content": text}]

    return datasets.Dataset.from_list(
        [
            {
                "images": [image.open() for image in row.images],
                "prompt": message(row, 0),
                "completion": message(row, 1),
            }
            for row in rows
        ]
    )
