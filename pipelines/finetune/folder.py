"""The folder of a fine-tuning run, and the settings that may differ when the run is resumed.

::

    <storage>/<name>/run.json       settings, fingerprint of the data, MLflow run, and finally the result
                     lock           held by the process that works on the run
                     rows.json      keys of the training and validation rows
                     answers/       the full-token model's answers to rows that have none
                     teacher/       the teacher's predictions, with distillation.cache
                     rejects.jsonl  rows that could not be used
                     checkpoints/   Ray Train's checkpoints
                     adapter/       the trained adapter
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

from pipelines._compat import CHECKPOINT_LIST
from pipelines.shared.folder import JobFolder

STATE = "state.pt"
"""The file of a checkpoint."""

MAY_DIFFER = frozenset(
    {
        *("scaling", "storage", "tracking", "resume_with_changes"),
        *("data.check_images", "data.on_bad_row"),  # the rows are chosen when the run begins
        *("training.micro_batch_size", "training.gradient_checkpointing", "training.prefetch"),
        *("training.log_every", "training.checkpoint_every", "training.keep_checkpoints"),
        *("evaluation.every", "evaluation.batch_size", "answering.engine"),
        "distillation.cache",
    }
)
"""Settings that do not change the trained weights."""

MAY_CHANGE = tuple(
    f"training.{name}"
    for name in (
        *("learning_rate", "warmup", "final_learning_rate", "weight_decay", "max_grad_norm", "precision"),
    )
)
"""Settings of the optimiser, which an unfinished run may change with ``resume_with_changes``."""


class FinetuneFolder(JobFolder):
    """Run ``name`` under ``storage``, new or resumed."""

    may_differ: ClassVar[frozenset[str]] = MAY_DIFFER

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.rows = self.path / "rows.json"
        self.answers = self.path / "answers"
        self.teacher = self.path / "teacher"
        self.rejects = self.path / "rejects.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"

    @property
    def trained(self) -> bool:
        """Whether the training is complete; the adapter may still have to be uploaded."""
        return "trained" in self.state

    @property
    def has_work(self) -> bool:
        return self.trained or any(self.checkpoints.glob("checkpoint_*"))

    @property
    def may_change(self) -> Collection[str]:
        return () if self.trained else MAY_CHANGE

    def repair_checkpoints(self) -> Path | None:
        """Return the checkpoint to continue from if Ray Train's list of checkpoints is lost; otherwise None.

        Ray Train writes its list in place. A full disk leaves it empty, and Ray Train then refuses to start.
        This removes the list. It also removes all checkpoints but the last complete one, because Ray Train no
        longer knows them.
        """
        file = self.checkpoints / CHECKPOINT_LIST
        try:
            if json.loads(file.read_text()):
                return None
        except FileNotFoundError:
            pass
        except ValueError:
            file.unlink()
        newest_first = sorted(self.checkpoints.glob("checkpoint_*"), reverse=True)
        complete = [path for path in newest_first if zipfile.is_zipfile(path / STATE)]
        for path in newest_first:
            if path not in complete[:1]:
                shutil.rmtree(path)
        return complete[0] if complete else None
