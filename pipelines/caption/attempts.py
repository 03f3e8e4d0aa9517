"""How often engines have begun a piece of work, in files that outlive them.

Ray gives the blocks of an engine that died to the next one, for ever. If it is a row that kills engines,
this is how the job finds it and gets past it.
"""

from __future__ import annotations

import shutil
from pathlib import Path


class Attempts:
    """One small file for each piece of work that is in hand; ``folder`` is seen by every node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, piece: str) -> int:
        """Count an attempt; returns how many have failed before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / piece).open("ab") as file:
            file.write(b".")
            return file.tell() - 1

    def end(self, piece: str) -> None:
        """It is done, or given up."""
        (self.folder / piece).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget what an earlier start of the job has counted."""
        shutil.rmtree(self.folder, ignore_errors=True)
