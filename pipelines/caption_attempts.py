"""How often engines have begun a block, in files that outlive them.

Ray gives the blocks of an engine that died to the next one, for ever. If it is a row that kills engines,
this is how the job gets past it.
"""

from __future__ import annotations

import shutil
from pathlib import Path


class Attempts:
    """One small file for each block that is being worked on; ``folder`` is seen by every node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, shard: int, row: int) -> int:
        """Count an attempt at the block that begins with a row; returns how many have failed before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file(shard, row).open("ab") as file:
            file.write(b".")
            return file.tell() - 1

    def end(self, shard: int, row: int) -> None:
        """The block is done."""
        self._file(shard, row).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget what an earlier start of the job has counted."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, shard: int, row: int) -> Path:
        return self.folder / f"{shard:06d}-{row}"
