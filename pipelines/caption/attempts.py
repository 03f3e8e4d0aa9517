"""Counts of how often engines have started a piece of work, in files that outlive the engines.

Ray gives the blocks of a dead engine to the next one, without end. If a row kills engines, the counts show
it, and the job can exclude the row.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.shared.files import storage_errors


class Attempts:
    """One small file for each piece of work in progress, in a folder that every node sees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, piece: str) -> int:
        """Count an attempt and return the number of failed attempts before it.

        Raises:
            StorageError: the count cannot be written.
        """
        with storage_errors(self.folder / piece):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / piece).open("ab") as file:
                file.write(b".")
                return file.tell() - 1

    def end(self, piece: str) -> None:
        """Remove the count of a piece that is finished or abandoned."""
        with storage_errors(self.folder / piece, "remove"):
            (self.folder / piece).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all counts, those of an earlier start of the job included."""
        shutil.rmtree(self.folder, ignore_errors=True)
