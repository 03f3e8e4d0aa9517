"""Check that paths are regular files: opening a named pipe waits for a writer, perhaps forever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_DESCRIPTORS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Where a shell puts the pipe of ``<(command)``, whose writer runs."""


class NotAFileError(OSError):
    """A path names something other than a regular file. Its text describes it without the path."""

    def __str__(self) -> str:
        return str(self.strerror)


def check_regular(path: str | Path, *, or_descriptor: bool = False) -> None:
    """Check that a path, once links are followed, is a regular file.

    Args:
        path: a local path.
        or_descriptor: accept the pipe of a process that the shell started, too.

    Raises:
        NotAFileError: it is a folder, a named pipe, a socket or a device.
        OSError: it does not exist, or access is denied.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 — a path may be bytes of no encoding
    if stat.S_ISREG(mode) or (or_descriptor and str(path).startswith(_DESCRIPTORS)):
        return
    found = _TYPES.get(stat.S_IFMT(mode), "something else")
    raise NotAFileError(errno.EINVAL, f"it is {found}, not a regular file", str(path))


def check_entries(folder: str | Path) -> None:
    """Check that a folder holds only regular files and folders. Broken links are ignored.

    Raises:
        NotAFileError: one of its entries is a named pipe, a socket or a device.
        OSError: the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if os.path.exists(entry.path) and not entry.is_dir():  # noqa: PTH110
                check_regular(entry.path)
