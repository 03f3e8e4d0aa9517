"""Names of folders like those of cloud drives, in which jobs must work."""

from __future__ import annotations

import shutil
from pathlib import Path

CLOUD_DRIVE = "My Drive/été #1 100%"
HOSTILE = "a [1] what? 12:30 'it' -x&y=%20 "  # the last space belongs to it


def copied(folder: Path, to: Path) -> Path:
    """Copy a folder into one with an odd name."""
    return Path(shutil.copytree(folder, to / CLOUD_DRIVE / folder.name))
