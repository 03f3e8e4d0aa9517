"""The folder of an analysis job."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pipelines.shared.folder import JobFolder


class AnalysisFolder(JobFolder):
    """Numbers, table and figures of the analysis ``name`` under ``storage``."""

    may_differ: ClassVar[frozenset[str]] = frozenset({"storage", "tracking", "report", "threads"})

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.numbers = self.path / "analysis.json"
        self.table = self.path / "analysis_table.md"
        self.figures = tuple(
            self.path / name for name in ("ffn_ratios.png", "ffn_heat.png", "skip_errors.png")
        )

    @property
    def has_work(self) -> bool:
        return bool(self.state.get("measured"))
