"""The folder of one scoring job.

::

    <storage>/<name>/run.json               settings, adapters, fingerprints, progress, result
                     lock                   held by the running job
                     questions/DATASET.txt  indices of the usable questions
                     answers/SYSTEM/…       one captioning job per dataset (see pipelines/caption/folder.py)
                     adapters/SYSTEM/       an adapter downloaded from MLflow
                     judge.jsonl            the judge's replies
                     items/SYSTEM/items.parquet    the scored items
                     comparison.md, comparison.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel

from pipelines.engines.config import NATIVE_ENGINE, assume_native
from pipelines.shared.folder import JobFolder


class ScoreFolder(JobFolder):
    """The folder of the scoring job ``name`` under ``storage``, new or continued."""

    reported: ClassVar[tuple[str, ...]] = ("resamples", "confidence", "objects")
    """Settings of the report alone. If they change, the report is written again from the same answers."""

    may_differ: ClassVar[frozenset[str]] = frozenset(
        {
            *("scaling", "storage", "max_error_fraction", "tracking", *NATIVE_ENGINE, *reported),
            *("judge.parallel", "judge.timeout", "judge.api_key_env", "judge.base_url"),
        }
    )
    hint: ClassVar[str] = "; a further system or dataset needs a job of another name"

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.answers = self.path / "answers"
        self.judge = self.path / "judge.jsonl"
        self.table = self.path / "comparison.md"
        self.figure = self.path / "comparison.png"

    def _read(self) -> dict[str, Any]:
        return assume_native(super()._read())

    @property
    def has_work(self) -> bool:
        return self.answers.exists()

    def is_reported(self, config: BaseModel) -> bool:
        """Return whether the report was made with the `reported` settings of ``config``."""
        before, now = self.state.get("config", {}), config.model_dump(mode="json")
        default = type(config).model_fields
        return all(before.get(name, default[name].default) == now[name] for name in self.reported)

    def questions(self, dataset: str) -> Path:
        """The file with the indices of a dataset's usable questions."""
        return self.path / "questions" / f"{dataset}.txt"

    def items(self, system: str) -> Path:
        """The file of a system's scored items."""
        return self.path / "items" / system / "items.parquet"
