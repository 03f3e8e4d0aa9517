"""The folder of an export job::

<storage>/<name>/run.json   settings, MLflow run, and finally the result
                 model/     the exported model; it appears when it is complete
                 adapter/   the adapter, if it came from MLflow
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pipelines.shared.folder import JobFolder


class ExportFolder(JobFolder):
    """The export ``name`` under ``storage``."""

    may_differ: ClassVar[frozenset[str]] = frozenset({"storage", "tracking", "hub"})

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.model = self.path / "model"
        self.downloads = self.path / "adapter"

    @property
    def has_work(self) -> bool:
        return self.model.exists()
