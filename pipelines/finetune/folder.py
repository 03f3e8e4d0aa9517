"""The folder of one fine-tuning run, and which of its settings may differ when it is resumed.

::

    <storage>/<name>/run.json       configuration, data fingerprint, MLflow run, result once there is one
                     lock           held by the job that works on the run, while it does
                     rows.json      which rows the run trains and is evaluated on
                     rejects.jsonl  rows that could not be used
                     checkpoints/   Ray Train's
                     adapter/       the result
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pipelines.shared.folder import JobFolder, meant
from pipelines.shared.sections import flatten

MAY_DIFFER = frozenset(
    {
        *("scaling", "storage", "tracking", "resume_with_changes"),
        *("data.check_images", "data.on_bad_row"),  # the rows are chosen when the run begins
        *("training.micro_batch_size", "training.gradient_checkpointing", "training.prefetch"),
        *("training.log_every", "training.checkpoint_every", "training.keep_checkpoints"),
        *("evaluation.every", "evaluation.batch_size"),
    }
)
"""Settings that do not change what a training computes."""

MAY_CHANGE = tuple(
    f"training.{name}"
    for name in (
        *("learning_rate", "warmup", "final_learning_rate", "weight_decay", "max_grad_norm", "precision"),
    )
)
"""Settings of the optimiser, with which an unfinished run may go on if that is asked for."""

PATHS = ("data.train", "data.validation", "data.image_root", "model.path")
"""Settings that are the same if they lead to the same file."""


class FinetuneFolder(JobFolder):
    """Run ``name`` under ``storage``, new or resumed."""

    may_differ: ClassVar[frozenset[str]] = MAY_DIFFER
    paths: ClassVar[tuple[str, ...]] = PATHS

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.rows = self.path / "rows.json"
        self.rejects = self.path / "rejects.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"

    @property
    def begun(self) -> bool:
        return "trained" in self.state or any(self.checkpoints.glob("checkpoint_*"))

    @property
    def may_change(self) -> Collection[str]:
        return () if "trained" in self.state else MAY_CHANGE


def real_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where the settings that are paths lead now."""
    settings = flatten(config)
    return {name: meant(settings.get(name)) for name in PATHS}
