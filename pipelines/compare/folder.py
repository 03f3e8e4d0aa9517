"""The folder of a comparison.

::

    <storage>/<skip>-against-<full>/run.json          settings, the two runs, and the comparison
                                    comparison.md     table
                                    comparison.png    figure
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pipelines.shared.folder import JobFolder


class ComparisonFolder(JobFolder):
    """The comparison of two runs under ``storage``.

    The evaluation is one step, which starts again under other settings or for other runs: results cannot mix.
    """

    may_differ: ClassVar[frozenset[str]] = frozenset({"storage", "readme", "threads"})

    def __init__(self, storage: Path, name: str) -> None:
        super().__init__(storage, name)
        self.table = self.path / "comparison.md"
        self.figure = self.path / "comparison.png"
